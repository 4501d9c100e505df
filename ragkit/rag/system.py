"""The RAG system: a retriever and a generator that answer questions from a corpus."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ragkit.config import RAGConfig
from ragkit.files import atomic_dir
from ragkit.prompts import get_template
from ragkit.rag.corpus import Passage, RetrievedPassage, load_corpus
from ragkit.rag.ensemble import passage_weights
from ragkit.rag.generator import Generator
from ragkit.rag.hybrid import UnknownRetriever, load_retriever, retriever_kind
from ragkit.rag.loading import resolve_device
from ragkit.rag.qdrant import QdrantStore
from ragkit.rag.retriever import DenseRetriever, Retriever
from ragkit.rag.store import KnowledgeStore, MemoryStore, StoreError, read_store

FORMAT = 1


@dataclass(frozen=True)
class Answer:
    """What a RAG system says to a question, and from which passages. `print` and Jupyter show all of it."""

    question: str
    text: str
    passages: tuple[RetrievedPassage, ...]

    def __str__(self) -> str:
        lines = [f"Question: {self.question}", f"Answer:   {self.text}"]
        for n, passage in enumerate(self.passages, start=1):
            lines.append(f"  [{n}] {passage.score:.3f}  {passage.title or passage.id}: {_short(passage.text)}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{n}</td><td>{passage.score:.3f}</td><td>{html.escape(passage.title or passage.id)}</td>"
            f'<td style="text-align:left">{html.escape(_short(passage.text, 300))}</td></tr>'
            for n, passage in enumerate(self.passages, start=1)
        )
        return (
            f"<div><b>Question:</b> {html.escape(self.question)}<br><b>Answer:</b> {html.escape(self.text)}"
            f"<table><thead><tr><th></th><th>score</th><th>passage</th><th>text</th></tr></thead>"
            f"<tbody>{rows}</tbody></table></div>"
        )


class RAGSystem:
    """A retriever, a generator and the settings that join them.

    Args:
        retriever: Finds passages: a `DenseRetriever`, `HybridRetriever`, `ragkit.gfm.GFMRetriever`, or anything with
            their `retrieve`.
        generator: Answers from them.
        config: `top_k`, `prompt` and the other settings; what the parts were made with stays as it is.

    Example:
        >>> rag = RAGSystem.from_documents({"Peru": "Lima is the capital of Peru."})  # doctest: +SKIP
        >>> rag.query("What is the capital of Peru?").text  # doctest: +SKIP
        'Lima'
    """

    def __init__(self, retriever: Retriever, generator: Generator, config: RAGConfig | None = None):
        self.retriever, self.generator = retriever, generator
        self.config = RAGConfig() if config is None else config
        self.template = get_template(self.config.prompt)  # a wrong name is an error now, not at the first question

    @classmethod
    def from_documents(
        cls,
        corpus: Any,
        config: RAGConfig | None = None,
        *,
        retriever: str | DenseRetriever | None = None,
        generator: str | Generator | None = None,
        **overrides: Any,
    ) -> RAGSystem:
        """Builds a system and its index.

        Args:
            corpus: Anything that `load_corpus` reads, for example `"small_world"`, a path or `{title: text}`.
            config: Settings; the defaults work offline.
            retriever: A name for `config.retriever`, or a retriever that is ready (its store is filled anew).
            generator: A name for `config.generator`, or a generator that is ready.
            **overrides: Fields of `RAGConfig`, for example `top_k=5`.

        Raises:
            CorpusError: The corpus is empty or a passage cannot be used.
            ConfigError: An override that `RAGConfig` does not know or allow.
            StoreError: A Qdrant collection holds other passages already.
        """
        named = {"retriever": retriever, "generator": generator}
        overrides.update({key: value for key, value in named.items() if isinstance(value, str)})
        config = RAGConfig(**{**(config.explicit() if config is not None else {}), **overrides})
        get_template(config.prompt)
        passages = load_corpus(corpus)  # before any model is loaded: it is what fails most often
        live = retriever if retriever is not None and not isinstance(retriever, str) else None
        if live is not None and not isinstance(live, DenseRetriever):
            raise TypeError(
                f"from_documents fills the store of a DenseRetriever; a {type(live).__name__} has its passages "
                "already: RAGSystem(retriever, generator, config)"
            )
        dense = live if live is not None else make_retriever(config)
        answering = generator if generator is not None and not isinstance(generator, str) else make_generator(config)
        index_corpus(dense, passages)
        return cls(dense, answering, config)

    def __repr__(self) -> str:
        return f"RAGSystem(\n  {self.retriever!r},\n  {self.generator!r},\n  top_k={self.config.top_k}\n)"

    def retrieve(self, question: str, top_k: int | None = None) -> list[RetrievedPassage]:
        """The best passages for one question: id, title, text and score of each."""
        return self.batch_retrieve([question], top_k)[0]

    def batch_retrieve(self, questions: Sequence[str], top_k: int | None = None) -> list[list[RetrievedPassage]]:
        """The best passages for each question.

        Args:
            questions: Questions.
            top_k: Passages for each; `config.top_k` by default. More than there are gives all.
        """
        if isinstance(questions, str):
            raise TypeError("batch_retrieve takes a list of questions; use retrieve for one")
        return self.retriever.retrieve(list(questions), self.config.top_k if top_k is None else top_k)

    def generate(self, question: str, passages: Sequence[Any]) -> str:
        """The answer to one question from given passages (strings or passages, best first)."""
        return self.batch_generate([question], [passages])[0]

    def batch_generate(self, questions: Sequence[str], passages: Sequence[Sequence[Any]]) -> list[str]:
        """The answer to each question from its passages, as `config.answer_from` says.

        With "joined" all passages of a question stand in one prompt, best first, and are cut where they are too long
        together. With "ensemble" each stands in a prompt of its own, and the predictions are mixed with the weights
        softmax(score / config.ensemble_gamma), or equally where passages have no score.
        """
        if len(questions) != len(passages):
            raise ValueError(f"{len(questions)} questions, but passages for {len(passages)}")
        generator = self.generator

        def encode(question: str, given: Sequence[Any]) -> list[int]:
            return generator.encode_prompt(self.template, question, given, reserve=generator.max_new_tokens)

        pairs = list(zip(questions, passages, strict=True))
        if self.config.answer_from == "joined":
            return generator.generate_ids([encode(question, given) for question, given in pairs])
        alone = [[encode(q, [passage]) for passage in given] if given else [encode(q, [])] for q, given in pairs]
        gamma = self.config.ensemble_gamma
        weights = [passage_weights(given, gamma) if given else [1.0] for _, given in pairs]
        return generator.generate_ensemble(alone, weights)

    def query(self, question: str, top_k: int | None = None) -> Answer:
        """Retrieves, then answers."""
        return self.batch_query([question], top_k)[0]

    def batch_query(self, questions: Sequence[str], top_k: int | None = None) -> list[Answer]:
        """Retrieves for all questions, then answers them all."""
        retrieved = self.batch_retrieve(questions, top_k)
        texts = self.batch_generate(questions, retrieved)
        return [
            Answer(question, text, tuple(passages))
            for question, text, passages in zip(questions, texts, retrieved, strict=True)
        ]

    def save(self, directory: str | Path) -> Path:
        """Writes the whole system as one folder, atomically: settings, encoders, passages, embeddings and generator.

        A model taken by name ("default" or from the hub) whose weights are untouched is kept as its name; all else,
        and every trained part, is in the folder, which may then be moved to another machine. The retriever may be any
        with `save(folder)`; what `load` needs for kinds that ragkit.rag does not have, its error says.

        Raises:
            TypeError: The retriever has no `save`.
        """
        retriever: Any = self.retriever
        if not hasattr(retriever, "save"):
            raise TypeError(f"save writes systems whose retriever has save(); {type(retriever).__name__} has none")
        head: dict[str, Any] = {"format": FORMAT}
        if not isinstance(retriever, DenseRetriever):
            head["retriever"] = retriever_kind(retriever)
        with atomic_dir(directory) as folder:
            self.config.save(folder / "config.yaml")
            retriever.save(folder / "retriever")
            self.generator.save(folder / "generator")
            (folder / "system.json").write_text(json.dumps(head) + "\n", encoding="utf-8")
        return Path(directory)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        device: str | None = None,
        store: KnowledgeStore | None = None,
        retriever: Retriever | None = None,
    ) -> RAGSystem:
        """Reads what `save` wrote; the answers are the same.

        Args:
            directory: The folder.
            device: In place of the saved setting.
            store: A store that holds the passages already, in place of the one that the settings name. With Qdrant
                the saved collection is used if it still holds the same passages, and filled from the folder if it is
                empty. Only for a `DenseRetriever`.
            retriever: In place of the saved one, for example
                `GFMRetriever.load(folder / "retriever")`, whose class ragkit.rag does not know.

        Raises:
            ValueError: A file is missing or corrupt (`StoreError` and `ConfigError` are such); the message names it.
                `UnknownRetriever`: a retriever must be given; the message is the code that does it.
        """
        folder = Path(directory)
        if not folder.is_dir():
            raise ValueError(f"no saved system at {folder}: not a folder")
        try:
            head = json.loads((folder / "system.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder / 'system.json'}: not a saved system, or it was cut off ({error})") from error
        if not isinstance(head, dict) or head.get("format") != FORMAT or not set(head) <= {"format", "retriever"}:
            raise ValueError(f"{folder / 'system.json'}: expected format {FORMAT}, found {head!r}")
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"{folder / 'config.yaml'}: missing; the folder was cut off while it was copied")
        config = RAGConfig.from_yaml(folder / "config.yaml")
        if device is not None:
            config.device = device
        resolved = resolve_device(config.device)
        if retriever is None and "retriever" in head:
            if store is not None:
                raise ValueError(
                    f"store: the saved retriever is a {head['retriever']}, only a DenseRetriever takes one"
                )
            try:
                retriever = load_retriever(
                    str(head["retriever"]), folder / "retriever", resolved, config.trust_remote_code
                )
            except UnknownRetriever as error:
                call = f"RAGSystem.load({str(directory)!r}, retriever={error.call})"
                raise UnknownRetriever(folder, call, ["from ragkit import RAGSystem", *error.imports]) from None
        elif retriever is None:
            if store is None and config.store == "qdrant":
                store = _reopen_qdrant(config, folder / "retriever" / "store")
            retriever = DenseRetriever.load(folder / "retriever", store, resolved, config.trust_remote_code)
        generator = Generator.load(folder / "generator", resolved, config.trust_remote_code)
        return cls(retriever, generator, config)


def make_retriever(config: RAGConfig) -> DenseRetriever:
    """The retriever that the settings describe, with an empty index (a Qdrant collection may hold passages)."""
    return DenseRetriever(
        encoder=config.retriever,
        passage_encoder=config.passage_retriever,
        store=_open_qdrant(config) if config.store == "qdrant" else None,
        query_prompt=config.query_prompt,
        passage_prompt=config.passage_prompt,
        batch_size=config.encode_batch_size,
        device=config.device,
        max_tokens=config.max_passage_tokens,
        trust_remote_code=config.trust_remote_code,
    )


def index_corpus(retriever: DenseRetriever, passages: Sequence[Passage]) -> None:
    """Fills the store of a retriever anew, but only where nothing is lost.

    Args:
        retriever: Its store is cleared. One that outlives the process must be empty, or hold nothing but passages
            that are in `passages` with the same title and text.
        passages: What the store holds afterwards.

    Raises:
        StoreError: The store holds other passages; it is left as it is.
    """
    store = retriever.store
    if not isinstance(store, MemoryStore):
        # By text too: the passages of a list of texts are numbered, so that any two such corpora share their ids.
        new = {passage.id: passage.full_text for passage in passages}
        other = next((passage.id for passage in store.passages() if new.get(passage.id) != passage.full_text), None)
        if other is not None:
            text = " with another text" if other in new else ""
            raise StoreError(
                f"{store!r} holds other passages already, for example {other!r}{text}; "
                "choose another collection, or clear() the store first"
            )
    retriever.index(passages)


def make_generator(config: RAGConfig) -> Generator:
    """The generator that the settings describe."""
    return Generator(
        model=config.generator,
        adapter=config.adapter,
        chat_template=config.chat_template,
        system_prompt=config.system_prompt,
        device=config.device,
        dtype=config.dtype,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.generate_batch_size,
        max_prompt_tokens=config.max_prompt_tokens,
        trust_remote_code=config.trust_remote_code,
    )


def _open_qdrant(config: RAGConfig) -> QdrantStore:
    return QdrantStore(path=config.qdrant_path, url=config.qdrant_url, collection=config.collection)


def _reopen_qdrant(config: RAGConfig, saved: Path) -> QdrantStore:
    store = _open_qdrant(config)
    passages, matrix = read_store(saved)
    if not len(store):
        if passages:
            store.add(passages, matrix)
        return store
    difference = _difference(store, passages, matrix)
    if difference is not None:
        store.close()
        raise StoreError(
            f"{store!r} no longer holds the passages of the saved system: {difference}; choose another collection in "
            "its config.yaml, or load with store=MemoryStore.load(...)"
        )
    return store


def _difference(store: KnowledgeStore, passages: Sequence[Passage], matrix: Tensor) -> str | None:
    """How a store differs from what was saved, in words; None if it holds the same."""
    present = list(store.passages())
    ids = [passage.id for passage in passages]
    if [passage.id for passage in present] != ids:
        return f"its ids are others, or in another order ({len(present)} passages, {len(ids)} were saved)"
    for found, saved in zip(present, passages, strict=True):
        if found.full_text != saved.full_text:
            return f"the passage {saved.id!r} has another text"
    if store.dim != matrix.shape[1]:
        return f"its vectors have size {store.dim}, those saved {matrix.shape[1]}"
    # Another system may have been trained and indexed in this collection since. Vectors that were only rounded on
    # their way through the database are the same.
    other = (~torch.isclose(store.embeddings(ids), matrix, atol=1e-3).all(dim=1)).nonzero()
    if len(other):
        return f"the vector of the passage {ids[int(other[0])]!r} is another, from an encoder with other weights"
    return None


def _short(text: str, length: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
