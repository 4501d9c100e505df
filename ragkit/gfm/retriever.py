"""The graph foundation model as the retriever of a RAG system: question -> entities -> GNN -> ranker -> passages."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ragkit.gfm.checkpoint import load_gfm
from ragkit.gfm.entity_search import EntitySearch
from ragkit.gfm.model import GNNRetriever
from ragkit.gfm.passages import GraphPassages
from ragkit.gfm.rankers import RANKERS, Incidence, entity_weights, rank
from ragkit.gfm.retriever_folder import read_retriever, write_retriever
from ragkit.gfm.text_encoder import InstructedEncoder, embed_relations, encode
from ragkit.graph import GraphError, KnowledgeGraph
from ragkit.graph.link import EntityLinker
from ragkit.rag.corpus import RetrievedPassage
from ragkit.rag.encoder import Encoder
from ragkit.rag.loading import resolve_device
from ragkit.rag.retriever import Retriever

SMOOTH = ("simple", "idf", "score_weighted_idf")  # rankers whose scores have a gradient


class GFMRetriever:
    """Retrieves passages with a graph foundation model.

    The entities of a question are linked, the model scores all entities of the graph, and a ranker turns their scores
    into scores of documents (GFM-RAG, Luo et al. 2025, arXiv:2502.01113). It fulfils the same protocols as
    `DenseRetriever` (`Retriever`, `TrainableRetriever`), so RAGSystem, LSR, RALT and `evaluate` take it.

    A question without any linked entity gets the passages of `fallback`, with their scores; without a fallback none,
    and one warning for each call names the first such question.

    Args:
        model: Put into eval mode here, and from then on left in its mode: what it keeps of the graph (relation tables,
            background) is of use for all later questions.
        graph: Its relation embeddings are made with `encoder` if it has none.
        encoder: An `Encoder`, a name for one, or anything with its `encode`; the one that the model was trained with.
        passages: Anything that `load_corpus` reads; None: the graph's own texts. See `GraphPassages`.
        linker: Anything with `link(questions) -> lists of objects with .id`; None: an `EntityLinker` by strings and by
            embeddings of `encoder`. That encodes the names of all entities when it first needs them.
        ranker: One of `RANKERS`, which turns logits [B, N] into document scores.
        ranker_options: Options of the ranker, such as {"k": 20}.
        batch_size: Questions that the model is asked at once.
        init_entities_weight: Weigh a question's entities by 1 / number of documents, as in training.
        fallback: A retriever for questions without an entity.
        score_ranker: The ranker of `score`, which must have a gradient: "simple", "idf" or "score_weighted_idf". None
            is `ranker` with its options if it is one of them, else "score_weighted_idf".
        cache: Where embeddings of relations and entity names are kept. True: the user's cache folder; a folder; False:
            nowhere.

    Attributes:
        store: The passages, see `GraphPassages`.
        stale: Always as `mark_stale` and `refresh` left it; retrieval does not depend on it (see `refresh`).

    Raises:
        ValueError: An unknown ranker, or passages of which none is in the graph.
        GraphError: The graph's relation embeddings are of another size than the model's.

    Example:
        >>> retriever = GFMRetriever(model, graph, "default")  # doctest: +SKIP
        >>> RAGSystem(retriever, generator).query("Who is the mother of the director of Jaws?")  # doctest: +SKIP
    """

    cosine_scores = False  # sums over entities: see `rescale` of LSRConfig

    def __init__(
        self,
        model: GNNRetriever,
        graph: KnowledgeGraph,
        encoder: Any = "default",
        passages: Any = None,
        linker: Any = None,
        ranker: str = "idf_topk",
        ranker_options: dict[str, Any] | None = None,
        batch_size: int = 8,
        init_entities_weight: bool = True,
        fallback: Retriever | None = None,
        score_ranker: str | None = None,
        cache: bool | str | Path = True,
    ) -> None:
        if not isinstance(model, GNNRetriever):
            raise TypeError(f"model: expected a GNNRetriever, found {type(model).__name__} (see as_retriever)")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a whole number from 1, found {batch_size}")
        self.ranker, self.ranker_options = ranker, dict(ranker_options or {})
        self.score_ranker = score_ranker
        self._rank_of = _ranker(ranker, self.ranker_options, "ranker", tuple(RANKERS))
        if score_ranker is None and ranker in SMOOTH:
            self._score_of = self._rank_of
        else:
            self._score_of = _ranker(score_ranker or "score_weighted_idf", {}, "score_ranker", SMOOTH)
        self.model, self.graph = model, graph
        if model.training:
            model.eval()
        self.encoder = Encoder(encoder, device=model.device) if isinstance(encoder, (str, Path)) else encoder
        self.store = GraphPassages(graph, passages)
        self.linker = EntityLinker(graph, EntitySearch(graph, self.encoder, cache)) if linker is None else linker
        self.batch_size, self.init_entities_weight, self.fallback = batch_size, init_entities_weight, fallback
        self.stale = False
        self._incidence = Incidence.of(graph)
        self._weights = entity_weights(self._incidence) if init_entities_weight else None
        if graph.rel_emb is None:
            embed_relations(graph, self.encoder, cache)
        found = 0 if graph.rel_emb is None else graph.rel_emb.shape[1]
        if found != model.settings.rel_emb_dim:
            trained = (model.encoder_info or {}).get("text_emb_model_name")
            raise GraphError(
                f"the relation embeddings of the graph have size {found}, the model wants {model.settings.rel_emb_dim}"
                f"{f' (it was trained with the encoder {trained!r})' if trained else ''}; give the model's own "
                "encoder, and set graph.rel_emb = None if they are of another one"
            )

    @classmethod
    def from_index(
        cls,
        dataset: str | Path,
        checkpoint: str | Path,
        encoder: Any = None,
        *,
        device: str | torch.device | None = "auto",
        v1_names: bool = False,
        **options: Any,
    ) -> GFMRetriever:
        """From a data set's folder and a checkpoint.

        Args:
            dataset: As in `KnowledgeGraph.load`.
            checkpoint: A folder or hub repository, as in `load_gfm`.
            encoder: As in the constructor; None: the one that the checkpoint names, with the texts that it puts before
                questions and relations, or else "default".
            device: Where model and encoder go.
            v1_names: As in `KnowledgeGraph.load`.
            **options: As in the constructor.
        """
        resolved = resolve_device(device)
        model = load_gfm(checkpoint, kind="retriever", device=resolved)
        info = model.encoder_info or {}
        instructs = ("", "")
        if encoder is None:
            instructs = (info.get("query_instruct") or "", info.get("passage_instruct") or "")
            encoder = info.get("text_emb_model_name") or "default"
            if info.get("normalize") is False:
                warnings.warn(
                    f"{checkpoint}: trained with embeddings of {encoder!r} that are not normalised, ragkit's Encoder "
                    "normalises them; give an encoder= with encode(texts, side) that does not, or fine-tune the model",
                    stacklevel=2,
                )
        if isinstance(encoder, (str, Path)):
            encoder = Encoder(encoder, device=resolved)
            if any(instructs):
                encoder = InstructedEncoder(encoder, *instructs)
        graph = KnowledgeGraph.load(dataset, v1_names=v1_names)
        return cls(model, graph, encoder, **options)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        name = getattr(self.encoder, "name", type(self.encoder).__name__)
        return f"GFMRetriever({self.graph!r}, {len(self.store)} passages, encoder {name}, ranker {self.ranker})"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    # ---- retrieval ----

    def link(self, questions: Sequence[str], entities: Sequence[Any] | None = None) -> list[list[int]]:
        """Entity ids of each question, each once.

        Args:
            questions: B texts.
            entities: B lists of entity names or ids in the graph, in place of the linker's; None among them leaves
                that question to the linker.

        Raises:
            ValueError: Another number of lists, or an id that is out of range (`GraphError`: an unknown name).
        """
        given: list[Any] = [None] * len(questions) if entities is None else list(entities)
        if len(given) != len(questions):
            raise ValueError(f"entities: {len(given)} lists for {len(questions)} questions")
        open_places = [place for place, names in enumerate(given) if names is None]
        linked = iter(self.linker.link([questions[place] for place in open_places]) if open_places else [])
        rows = [[link.id for link in next(linked)] if names is None else self._ids(names) for names in given]
        return [list(dict.fromkeys(row)) for row in rows]

    def _ids(self, names: Any) -> list[int]:
        if isinstance(names, str):
            raise TypeError(f"entities: expected a list of names or ids for each question, found the text {names!r}")
        ids = []
        for name in names.tolist() if isinstance(names, Tensor) else names:
            if isinstance(name, str):
                ids.append(self.graph.entities.index(name))
            elif 0 <= int(name) < self.graph.num_entities:
                ids.append(int(name))
            else:
                raise ValueError(f"entities: id {name} is not in 0 ... {self.graph.num_entities - 1}")
        return ids

    def retrieve(
        self, questions: Sequence[str], top_k: int, entities: Sequence[Any] | None = None
    ) -> list[list[RetrievedPassage]]:
        """For each question the `top_k` passages of highest score, best first; all where there are fewer.

        Args:
            questions: B texts.
            top_k: Passages for each question. Equal scores stand in the order of the graph's documents; with "topk"
                and "idf_topk" all passages without one of the best entities have the score 0.
            entities: As in `link`.
        """
        if isinstance(questions, str):
            raise TypeError("retrieve takes a list of questions; found one string")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, found {top_k}")
        questions = list(questions)
        ids = self.link(questions, entities)
        found: list[list[RetrievedPassage]] = [[] for _ in questions]
        linked = [place for place, row in enumerate(ids) if row]
        with torch.no_grad():
            embeddings = encode(self.encoder, [questions[place] for place in linked], "query") if linked else None
            for start in range(0, len(linked), self.batch_size):
                places = linked[start : start + self.batch_size]
                assert embeddings is not None
                logits = self._logits(embeddings[start : start + len(places)], [ids[place] for place in places])
                scores = self.store.columns(self._rank_of(logits, self._documents()))  # [B, N] -> [B, U]
                values, columns = rank(scores, top_k)  # [B, K] each
                for place, row, best in zip(places, columns.tolist(), values.tolist(), strict=True):
                    passages = [self.store.of_column(column) for column in row]
                    found[place] = [RetrievedPassage.of(p, s) for p, s in zip(passages, best, strict=True)]
        self._retrieve_unlinked(questions, [place for place, row in enumerate(ids) if not row], top_k, found)
        return found

    def _retrieve_unlinked(
        self, questions: list[str], places: list[int], top_k: int, found: list[list[RetrievedPassage]]
    ) -> None:
        if not places:
            return
        if self.fallback is not None:
            passages = self.fallback.retrieve([questions[place] for place in places], top_k)
            for place, row in zip(places, passages, strict=True):
                found[place] = list(row)
            return
        warnings.warn(
            f"no entity of the graph is named in {len(places)} of {len(questions)} questions, so no passage is found "
            f"(first: {questions[places[0]][:120]!r}); give GFMRetriever a fallback= retriever for them",
            stacklevel=3,
        )

    def _logits(self, embeddings: Tensor, ids: list[list[int]]) -> Tensor:
        """[B, N]."""
        return self.model(self.graph, embeddings, ids, self._weights)

    def _documents(self) -> Incidence:
        if self._incidence.ptr.device != self.device:
            self._incidence = self._incidence.to(self.device)  # moved once, with the model
        return self._incidence

    # ---- what LSR trains ----

    def trainable_modules(self, part: Literal["query", "both"] = "query") -> dict[str, nn.Module]:
        """The model, for either part: it reads question and documents at once. The text encoder stays frozen, as in
        GFM-RAG, since relations and entity names were embedded by it."""
        _check_part(part)
        return {"gfm": self.model}

    def separate_query_encoder(self) -> bool:
        """False: nothing of the index depends on what is trained."""
        return False

    def score(
        self, questions: Sequence[str], passage_ids: Sequence[Sequence[str]], part: Literal["query", "both"] = "query"
    ) -> Tensor:
        """Scores of given passages, with gradient into the model.

        They are those of `score_ranker`, not of `ranker`, if that has no gradient. A passage that is not in the graph
        scores 0, as a document without entities. A question without a linked entity is scored by its text alone.

        Args:
            questions: B questions.
            passage_ids: B lists of ids of passages; they may differ in length.
            part: "query" or "both"; the same here (see `trainable_modules`).

        Returns:
            float32 [B, K] with K the longest list; shorter rows are filled with -inf.

        Raises:
            ValueError: An id that no passage has.
        """
        _check_part(part)
        if len(questions) != len(passage_ids):
            raise ValueError(f"{len(questions)} questions, but {len(passage_ids)} lists of passage ids")
        width = max((len(ids) for ids in passage_ids), default=0)
        if width == 0:
            return torch.empty(len(questions), 0, device=self.device)
        document = torch.full((len(questions), width), -2)  # [B, K]; -1: not in the graph, -2: padding
        for row, ids in enumerate(passage_ids):
            document[row, : len(ids)] = torch.tensor([self.store.document_of(i) for i in ids], dtype=torch.long)
        document = document.to(self.device)
        logits = self._logits(encode(self.encoder, list(questions), "query"), self.link(list(questions)))
        scores = self._score_of(logits, self._documents()).gather(1, document.clamp(min=0))  # [B, docs] -> [B, K]
        return scores.masked_fill(document == -1, 0.0).masked_fill(document == -2, -torch.inf)

    def mark_stale(self) -> None:
        """Says that the model was trained."""
        self.stale = True

    def refresh(self) -> None:
        """Lets the model forget what it kept for its old weights. (It sees most changes itself; not those that were
        made through `parameter.data`.)"""
        self.model.train(self.model.training)
        self.stale = False

    # ---- on disk ----

    def save(self, directory: str | Path) -> Path:
        """Writes model, graph, passages, encoder and settings as one folder, atomically.

        An encoder taken by name and not trained is kept by its name. Not written, and wanted again by `load`, are an
        encoder that is no `Encoder`, a linker that is no `EntityLinker` (or has a search of its own), and a fallback
        that is no `DenseRetriever`.
        """
        return write_retriever(self, directory)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        encoder: Any = None,
        linker: Any = None,
        fallback: Retriever | None = None,
        device: str | torch.device | None = "auto",
        cache: bool | str | Path = True,
        trust_remote_code: bool = False,
    ) -> GFMRetriever:
        """Reads what `save` wrote; the answers are the same.

        Args:
            directory: The folder.
            encoder, linker, fallback: In place of the saved ones; needed where they could not be saved.
            device: Where model and encoder go.
            cache: As in the constructor.
            trust_remote_code: As in `Encoder`.

        Raises:
            ValueError: A file is missing, cut short or altered (it is named), or a part is needed.
        """
        given = {"encoder": encoder, "linker": linker, "fallback": fallback}
        return cls(**read_retriever(directory, given, resolve_device(device), cache, trust_remote_code))


def _ranker(name: str, options: dict[str, Any], what: str, allowed: tuple[str, ...]) -> Any:
    if name not in allowed:
        raise ValueError(f"{what}: expected one of {', '.join(allowed)}, found {name!r}")
    if options and (set(options) != {"k"} or name not in ("topk", "idf_topk", "score_weighted_idf")):
        raise ValueError(f"{what}_options: found {options}; only topk, idf_topk and score_weighted_idf take one, k")
    return partial(RANKERS[name], **options)


def _check_part(part: str) -> None:
    if part not in ("query", "both"):
        raise ValueError(f'part must be "query" or "both", found {part!r}')
