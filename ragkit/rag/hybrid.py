"""Several retrievers as one: their candidates fused by rank or by score."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ragkit.files import atomic_dir
from ragkit.rag.corpus import RetrievedPassage
from ragkit.rag.retriever import DenseRetriever, Retriever

Method = Literal["rrf", "minmax", "zscore", "loglinear"]
METHODS = ("rrf", "minmax", "zscore", "loglinear")
SHARE_FLOOR = 1e-4  # what a passage counts beside the shares of a retriever's scores
FORMAT = 1
HEAD = "hybrid.json"
SETTINGS = ("method", "weights", "depth", "k", "missing", "logs")


def reciprocal_ranks(ranks: Sequence[int | None], weights: Sequence[float], k: float = 60) -> float:
    """Σ_i w_i / (k + rank_i), over the retrievers that found the passage.

    Reciprocal rank fusion, Cormack, Clarke and Buettcher, SIGIR 2009. The sum is rounded once, so that it does not
    depend on the order of the retrievers and equal sums are equal.

    Args:
        ranks: Its rank in each retriever's list, from 1; None where it is not in the list.
        weights: One for each retriever.
        k: 60 in the paper; the larger, the less the first ranks stand out.
    """
    return math.fsum(w / (k + rank) for rank, w in zip(ranks, weights, strict=True) if rank is not None)


def fuse_scores(
    scores: Tensor,
    weights: Sequence[float],
    normalise: Literal["minmax", "zscore"] = "minmax",
    missing: Literal["lowest", "zero"] = "lowest",
) -> Tensor:
    """Weighted sum of normalised scores.

        minmax: (s − min) / (max − min); 1 where all are equal.    zscore: (s − mean) / std; 0 where all are equal.

    Minimum, mean and (population) deviation are those of one retriever's found passages for one question.

    Args:
        scores: [M, B, C] scores of M retrievers for B questions and C passages, -inf where a passage was not found.
        weights: M weights.
        normalise: How.
        missing: What a passage counts that a retriever did not find. "lowest": as that retriever's lowest found one (0
            with minmax); "zero": 0, which with zscore is its mean.

    Returns:
        [B, C] float64; -inf for passages that none found.

    Raises:
        ValueError: Sizes that differ, NaN or +inf, or an unknown kind.
    """
    if scores.ndim != 3 or len(weights) != len(scores):
        raise ValueError(f"scores: expected [{len(weights)}, B, C] (one for each weight), found {list(scores.shape)}")
    if normalise not in ("minmax", "zscore") or missing not in ("lowest", "zero"):
        raise ValueError(f'expected "minmax" or "zscore" and "lowest" or "zero", found {normalise!r} and {missing!r}')
    if scores.isnan().any() or (scores == torch.inf).any():
        raise ValueError("scores: NaN or infinity, which cannot be fused")
    s = scores.double()
    found = s != -torch.inf  # [M, B, C]
    count = found.sum(-1, keepdim=True).clamp(min=1)  # [M, B, 1]
    low = s.masked_fill(~found, torch.inf).amin(-1, keepdim=True) if s.shape[-1] else s.new_zeros(*s.shape[:2], 1)
    if normalise == "minmax":
        span = (s.amax(-1, keepdim=True) if s.shape[-1] else low) - low
        scaled = torch.where(span > 0, (s - low) / span, 1.0)
        least = torch.zeros_like(low)
    else:
        mean = s.masked_fill(~found, 0).sum(-1, keepdim=True) / count
        std = ((s - mean).masked_fill(~found, 0).square().sum(-1, keepdim=True) / count).sqrt()
        same = (s.masked_fill(~found, -torch.inf).amax(-1, keepdim=True) == low) if s.shape[-1] else std == 0
        scaled = torch.where(same | (std == 0), 0.0, (s - mean) / std)
        least = torch.where(same | (std == 0), 0.0, (low - mean) / std)
    if missing == "zero":
        least = torch.zeros_like(least)
    scaled = torch.where(found, scaled, least)  # all 0 for a retriever that found nothing for a question
    total = (scaled * torch.tensor(list(weights), dtype=torch.float64, device=s.device)[:, None, None]).sum(0)
    return total.masked_fill(~found.any(0), -torch.inf)


def fuse_loglinear(scores: Tensor, weights: Sequence[float], logs: Sequence[bool]) -> Tensor:
    """Log-linear fusion: the product of what the retrievers hold likely, each to the power of its weight.

        Σ_m w_m · log(s_m / Σ s_m + 1e-4)   for scores that are sums of evidence (`logs`), as a GFM's,
        Σ_m w_m · s_m                       for scores that are logarithms up to a factor, as a cosine (of which a
                                            softmax is taken): a weight of 8 is a temperature of 1/8

    A sum of evidence grows without bound on a few passages, so that neither its z-score nor its min-max leaves the
    cosine a say among the others; its logarithm does.

    Args:
        scores: [M, B, C] scores of M retrievers for B questions and C passages, -inf where a passage was not found.
        weights: M weights.
        logs: M marks; True takes the logarithm of the share.

    Returns:
        [B, C] float64; -inf for passages that none found. A passage that one retriever did not find counts as its
        lowest found one, or as a share of 0.

    Raises:
        ValueError: Sizes that differ, NaN or +inf, or a score below 0 where the logarithm is taken.
    """
    if scores.ndim != 3 or not len(weights) == len(logs) == len(scores):
        raise ValueError(
            f"scores [M, B, C], M weights and M marks: found {list(scores.shape)}, {len(weights)}, {len(logs)}"
        )
    if scores.isnan().any() or (scores == torch.inf).any():
        raise ValueError("scores: NaN or infinity, which cannot be fused")
    s = scores.double()
    found = s != -torch.inf
    total = s.new_zeros(s.shape[1:])
    for one, there, weight, log in zip(s, found, weights, logs, strict=True):
        if log:
            if (one[there] < 0).any():
                raise ValueError(
                    f"a score of {float(one[there].min()):g} has no logarithm; set its mark in logs to False"
                )
            kept = one.masked_fill(~there, 0)
            part = (kept / kept.sum(-1, keepdim=True).clamp(min=1e-300) + SHARE_FLOOR).log()
        else:
            lowest = one.masked_fill(~there, torch.inf).amin(-1, keepdim=True) if one.shape[-1] else one
            part = torch.where(there, one, torch.where(lowest.isinf(), 0.0, lowest))
        total = total + weight * part
    return total.masked_fill(~found.any(0), -torch.inf)


class UnknownRetriever(ValueError):
    """A saved retriever that ragkit.rag cannot load, because it does not know its class.

    Attributes:
        call: The call that loads it.
        imports: The imports that the call needs.
    """

    def __init__(self, folder: Path, call: str, imports: Sequence[str]) -> None:
        self.call, self.imports = call, list(dict.fromkeys(imports))
        lines = "\n".join(["", *self.imports, call])
        super().__init__(f"{folder}: a retriever in it is not of ragkit.rag and must be loaded by you:{lines}")


def retriever_kind(retriever: Any) -> str:
    """Module and class of a retriever, for `load_retriever`."""
    return f"{type(retriever).__module__}.{type(retriever).__qualname__}"


def load_retriever(
    kind: str, folder: Path, device: str | torch.device | None, trust_remote_code: bool
) -> DenseRetriever | HybridRetriever:
    """Loads a retriever that was saved by its `save`.

    Args:
        kind: From `retriever_kind`. It is never imported: what a folder names must not decide what code runs.
        folder: Its folder.
        device: Where it goes.
        trust_remote_code: As in `DenseRetriever`.

    Raises:
        UnknownRetriever: It is of another class.
    """
    if kind == f"{DenseRetriever.__module__}.DenseRetriever":
        return DenseRetriever.load(folder, device=device, trust_remote_code=trust_remote_code)
    if kind == f"{__name__}.HybridRetriever":
        return HybridRetriever.load(folder, device=device, trust_remote_code=trust_remote_code)
    module, _, name = kind.rpartition(".")
    raise UnknownRetriever(folder, f"{name}.load({str(folder)!r})", [f"from {module} import {name}"])


class HybridRetriever:
    """Fuses the candidates of two or more retrievers.

    Passages are matched by id. Equal fused scores stand in the order of the first retriever's list, then of what only
    the second found, and so on.

    Args:
        retrievers: Two or more, of any kind.
        method: "rrf": reciprocal rank fusion, which needs no comparable scores (see `reciprocal_ranks`); "minmax" or
            "zscore": the weighted sum of scores that are normalised for each question and retriever over the
            candidates (see `fuse_scores`); "loglinear": the product of experts (see `fuse_loglinear`), the best found
            for a GFM before a dense retriever, with weights (1, 8).
        weights: One for each retriever; None: 1 each.
        depth: Candidates that each retriever is asked for (at least `top_k`).
        k: The constant of reciprocal rank fusion.
        missing: With "minmax" and "zscore", what a passage counts that a retriever did not find; see `fuse_scores`.
        logs: With "loglinear", of which retrievers the logarithm is taken; None: of the first alone.

    Example:
        >>> hybrid = HybridRetriever([gfm_retriever, dense_retriever])  # doctest: +SKIP
        >>> hybrid.retrieve(["Who founded the maker of the Walkman?"], top_k=5)  # doctest: +SKIP
    """

    def __init__(
        self,
        retrievers: Sequence[Retriever],
        method: Method = "rrf",
        weights: Sequence[float] | None = None,
        depth: int = 100,
        k: float = 60,
        missing: Literal["lowest", "zero"] = "lowest",
        logs: Sequence[bool] | None = None,
    ) -> None:
        self.retrievers = list(retrievers)
        self.weights = [1.0] * len(self.retrievers) if weights is None else [float(weight) for weight in weights]
        self.method, self.depth, self.k, self.missing = method, depth, k, missing
        self.logs = (
            [number == 0 for number in range(len(self.retrievers))] if logs is None else [bool(log) for log in logs]
        )
        if len(self.retrievers) < 2:
            raise ValueError(f"retrievers: expected two or more, found {len(self.retrievers)}")
        if len(self.weights) != len(self.retrievers):
            raise ValueError(f"weights: found {len(self.weights)} for {len(self.retrievers)} retrievers")
        if len(self.logs) != len(self.retrievers):
            raise ValueError(f"logs: found {len(self.logs)} for {len(self.retrievers)} retrievers")
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights) or not any(self.weights):
            raise ValueError(f"weights: expected numbers from 0, not all 0, found {self.weights}")
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, found {method!r}")
        if missing not in ("lowest", "zero"):
            raise ValueError(f'missing: expected "lowest" or "zero", found {missing!r}')
        if depth < 1 or k < 0:
            raise ValueError(f"expected depth from 1 and k from 0, found depth {depth} and k {k}")

    def __repr__(self) -> str:
        return f"HybridRetriever({self.retrievers!r}, {self.method}, weights {self.weights})"

    @property
    def store(self) -> Any:
        """The store of the first retriever that has one, as RALT's `add_gold` reads it."""
        for retriever in self.retrievers:
            if hasattr(retriever, "store"):
                return retriever.store
        raise AttributeError("none of the retrievers has a store")

    def retrieve(self, questions: Sequence[str], top_k: int) -> list[list[RetrievedPassage]]:
        """For each question up to `top_k` passages, best first, with their fused scores.

        Raises:
            ValueError: Two retrievers give one id to different texts.
        """
        if isinstance(questions, str):
            raise TypeError("retrieve takes a list of questions; found one string")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, found {top_k}")
        if not questions:
            return []
        depth = max(self.depth, top_k)
        lists = [retriever.retrieve(list(questions), depth) for retriever in self.retrievers]
        return [self._fuse(rows)[:top_k] for rows in zip(*lists, strict=True)]

    def _fuse(self, rows: Sequence[Sequence[RetrievedPassage]]) -> list[RetrievedPassage]:
        """One question's candidates from each retriever, as one list."""
        passages: dict[str, RetrievedPassage] = {}  # in the order that settles ties
        for number, row in enumerate(rows):
            for passage in row:
                first = passages.setdefault(passage.id, passage)
                if first.full_text != passage.full_text:
                    raise ValueError(
                        f"the passage {passage.id!r} has another text in {type(self.retrievers[number]).__name__} "
                        f"(retriever {number}) than in those before it: the retrievers must share one corpus"
                    )
        place = {identity: column for column, identity in enumerate(passages)}
        if self.method == "rrf":
            ranks: list[list[int | None]] = [[None] * len(rows) for _ in place]
            for number, row in enumerate(rows):
                for rank, passage in enumerate(row, start=1):
                    ranks[place[passage.id]][number] = rank
            fused = [reciprocal_ranks(row, self.weights, self.k) for row in ranks]
        else:
            scores = torch.full((len(rows), 1, len(place)), -torch.inf, dtype=torch.float64)
            for number, row in enumerate(rows):
                for passage in row:
                    scores[number, 0, place[passage.id]] = passage.score
            if self.method == "loglinear":
                fused = fuse_loglinear(scores, self.weights, self.logs)[0].tolist()
            else:
                fused = fuse_scores(scores, self.weights, self.method, self.missing)[0].tolist()
        order = sorted(range(len(fused)), key=lambda column: -fused[column])  # stable
        listed = list(passages.values())
        return [RetrievedPassage.of(listed[column], fused[column]) for column in order]

    def save(self, directory: str | Path) -> Path:
        """Writes the retrievers, each in a folder of its own (0, 1, ...), and the settings, atomically.

        Raises:
            TypeError: A retriever cannot be saved.
        """
        for number, retriever in enumerate(self.retrievers):
            if not hasattr(retriever, "save"):
                raise TypeError(f"retriever {number}, a {type(retriever).__name__}, has no save()")
        with atomic_dir(directory) as folder:
            for number, retriever in enumerate(self.retrievers):
                retriever.save(folder / str(number))  # type: ignore[attr-defined]
            head = {
                "format": FORMAT,
                "settings": {name: getattr(self, name) for name in SETTINGS},
                "retrievers": [retriever_kind(retriever) for retriever in self.retrievers],
            }
            (folder / HEAD).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")
        return Path(directory)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        retrievers: Mapping[int, Retriever] | None = None,
        device: str | torch.device | None = "auto",
        trust_remote_code: bool = False,
    ) -> HybridRetriever:
        """Reads what `save` wrote.

        Args:
            directory: The folder.
            retrievers: Place -> retriever, loaded by the caller; needed for kinds that ragkit.rag does not have. The
                error names the call for each.
            device: Where the others go.
            trust_remote_code: As in `DenseRetriever`.

        Raises:
            ValueError: A file is missing or corrupt (`UnknownRetriever`: a retriever is needed).
        """
        folder, given = Path(directory), dict(retrievers or {})
        path = folder / HEAD
        try:
            head = json.loads(path.read_text(encoding="utf-8"))
            if head["format"] != FORMAT:
                raise ValueError(f"expected format {FORMAT}, found {head['format']!r}")
            kinds, settings = list(head["retrievers"]), dict(head["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a saved HybridRetriever, or it was cut off ({error!r})") from error
        calls, imports = {}, []
        for number, kind in enumerate(kinds):
            if number not in given:
                try:
                    given[number] = load_retriever(kind, folder / str(number), device, trust_remote_code)
                except UnknownRetriever as error:
                    calls[number] = error.call
                    imports += error.imports
        if calls:
            listed = ", ".join(f"{number}: {call}" for number, call in calls.items())
            call = f"HybridRetriever.load({str(folder)!r}, retrievers={{{listed}}})"
            raise UnknownRetriever(folder, call, ["from ragkit.rag.hybrid import HybridRetriever", *imports])
        return cls([given[number] for number in range(len(kinds))], **settings)
