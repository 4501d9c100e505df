"""GFM-RAG's `GFMRetriever` (stage 3), by its own names, over ragkit's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkit.compat.gfmrag_keys import KNOWN_CHOICES, RANKER_CLASSES
from ragkit.compat.hydra_yaml import Choices, Unresolved, compose, leaves
from ragkit.settings import ConfigError, read_yaml

if TYPE_CHECKING:
    from ragkit.gfm.retriever import GFMRetriever as Retriever

PARTS = ("ner_model", "el_model")


class GFMRetriever:
    """Retrieves documents for one question at a time, as dicts, as GFM-RAG's class of this name does.

    Entities are found by ragkit's linker (words and embeddings) instead of a language model and ColBERT, so the
    entities of a question may be others, and nothing is asked of a server.

    Args:
        retriever: A `ragkit.gfm.GFMRetriever`, which has more: batches, LSR, saving.

    Attributes:
        retriever: The same.

    Example:
        >>> retriever = GFMRetriever.from_config("stage3_qa_inference.yaml")  # doctest: +SKIP
        >>> retriever.retrieve("Who is the president of France?", top_k=5)[0]["title"]  # doctest: +SKIP
    """

    def __init__(self, retriever: Retriever) -> None:
        self.retriever = retriever

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | str | Path, **options: Any) -> GFMRetriever:
        """From the settings of a stage 3 file.

        Args:
            cfg: The file, or its content: `dataset.root`, `dataset.data_name` (also under `dataset.cfgs`),
                `graph_retriever.model_path`, `.doc_ranker` (or the `defaults` choice) and `.init_entities_weight`.
            **options: Arguments of `ragkit.gfm.GFMRetriever.from_index`, such as linker, encoder, device.

        Raises:
            ConfigError: A setting is missing; the message names it.
        """
        from ragkit.gfm.retriever import GFMRetriever as Retriever  # imports torch

        source = str(cfg) if isinstance(cfg, (str, Path)) else "the settings"
        raw = read_yaml(Path(cfg)) if isinstance(cfg, (str, Path)) else _plain(cfg)
        folder = Path(cfg).parent if isinstance(cfg, (str, Path)) else None
        given = dict(leaves(compose(raw, folder, Choices(known=KNOWN_CHOICES), source)))

        def find(what: str, *keys: str, default: Any = None) -> Any:
            value = next((given[key] for key in keys if given.get(key) is not None), default)
            if isinstance(value, Unresolved):
                raise value.error
            if value is None and default is None and what:
                raise ConfigError(f"{source}: expected {keys[0]}, {what}; it is not there")
            return value

        root = find("the folder of the data sets", "dataset.root", "dataset.cfgs.root")
        name = find("the data set's folder in it", "dataset.data_name", "dataset.cfgs.data_name")
        checkpoint = find("the model", "graph_retriever.model_path")
        places = ("graph_retriever.doc_ranker", "doc_ranker", "graph_retriever.ranker")
        target = find("", *(f"{place}._target_" for place in places))
        k = find("", *(f"{place}.top_k" for place in places))
        weighs = find("", "graph_retriever.init_entities_weight", "test.init_entities_weight", default=True)
        ranker = "idf_topk" if target is None else RANKER_CLASSES.get(str(target).rpartition(".")[2])
        if ranker is None:
            raise ConfigError(f"{source}: doc_ranker: found {target}, expected one of {', '.join(RANKER_CLASSES)}")
        ours = {
            "ranker": ranker,
            "ranker_options": {"k": k} if k is not None and ranker in ("topk", "idf_topk") else {},
            "init_entities_weight": weighs,
        }
        unused = [part for part in PARTS if any(key.startswith(f"graph_retriever.{part}") for key in given)]
        if unused and "linker" not in options:
            print(f"{source}: {' and '.join(unused)} are not used; ragkit links entities itself (linker=...)")
        return cls(Retriever.from_index(Path(root) / name, checkpoint, **{**ours, **options}))

    def retrieve(self, query: str, top_k: int) -> list[dict[str, Any]]:
        """The `top_k` documents of a question, best first.

        Args:
            query: The question.
            top_k: Documents to return; all, if there are fewer.

        Returns:
            Dicts of title, content, score and norm_score, which is the score's place between the lowest (0) and the
            highest (1) of all documents that have a text; 0 where all are equal.
        """
        if not isinstance(query, str):
            raise TypeError(f"query: expected one question, found {type(query).__name__}; see .retriever for many")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, found {top_k}")
        (found,) = self.retriever.retrieve([query], len(self.retriever.store))
        if not found:
            return []
        low, high = found[-1].score, found[0].score
        return [
            {
                "title": passage.title or passage.id,
                "content": passage.text,
                "score": passage.score,
                "norm_score": (passage.score - low) / (high - low) if high > low else 0.0,
            }
            for passage in found[:top_k]
        ]


def _plain(value: Any) -> Any:
    """Mappings of any kind (OmegaConf's too) as dicts; their references are followed on the way."""
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in value}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
