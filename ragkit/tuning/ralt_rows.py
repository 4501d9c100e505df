"""Training instances of RALT: what they hold, how they make a batch, and that a resumed run has the same ones."""

from __future__ import annotations

import hashlib
import html
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ragkit.files import atomic_write_json
from ragkit.processes import is_first
from ragkit.runs import Run
from ragkit.tuning.fused_loss import IGNORED
from ragkit.tuning.qa_data import DataError, QAExample


@dataclass(frozen=True)
class RALTRow:
    """One training instance: a prompt with its passages, and the response whose tokens make the loss.

    Attributes:
        id: The example's id (several rows share it with context="each").
        question: The question.
        passages: The passages in the prompt, best first.
        prompt_ids: Tokens of the prompt; no loss on them.
        response_ids: Tokens of the response and the end-of-sequence token.
        prompt: The prompt as the model sees it, decoded from its tokens.
        response: The response, decoded from its tokens.
        weight: Factor on the loss of this instance.
    """

    id: str
    question: str
    passages: tuple[Any, ...]
    prompt_ids: tuple[int, ...] = field(repr=False)
    response_ids: tuple[int, ...] = field(repr=False)
    prompt: str
    response: str
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def _counts(self) -> str:
        counts = f"{len(self.prompt_ids)} prompt + {len(self.response_ids)} response tokens"
        return counts if self.weight == 1.0 else f"{counts}, weight {self.weight:.2f}"

    def __repr__(self) -> str:
        return f"RALTRow({self.id}, {self._counts()})\n{self.prompt}▶{self.response}"

    def _repr_html_(self) -> str:
        prompt, response = (html.escape(text).replace("\n", "<br>") for text in (self.prompt, self.response))
        head = html.escape(f"{self.id} · {self._counts()}")
        return f'<div><b>{head}</b><div style="text-align:left">{prompt}<mark><b>{response}</b></mark></div></div>'


@dataclass(frozen=True)
class Collator:
    """Batches of rows with labels on the response only.

    Attributes:
        pad_id: Fills rows up on the right.
        pack: Longest row of packed instances, in tokens; None: one instance a row. Packed rows have no attention mask:
            `position_ids` that start again tell instances (and the padding) apart, and transformers makes the mask.
    """

    pad_id: int
    pack: int | None = None

    def __call__(self, rows: Sequence[RALTRow]) -> dict[str, Any]:
        """B rows -> int64 [B, T] input_ids, labels, and attention_mask, or with `pack` position_ids, and fewer rows.

        Also `ids`, for error messages, and where weights differ from 1 loss_weights, float [B, T].
        """
        bins = [[row] for row in rows] if self.pack is None else packed(rows, self.pack)
        shape = len(bins), max(sum(map(len, held)) for held in bins)
        input_ids = torch.full(shape, self.pad_id)
        labels = torch.full(shape, IGNORED)
        weights = torch.ones(shape)
        lengths = torch.zeros(len(bins), dtype=torch.long)
        position_ids = torch.arange(shape[1]).repeat(shape[0], 1)
        for number, held in enumerate(bins):
            start = 0
            for row in held:
                middle, end = start + len(row.prompt_ids), start + len(row)
                input_ids[number, start:end] = torch.tensor(row.prompt_ids + row.response_ids)
                labels[number, middle:end] = input_ids[number, middle:end]
                weights[number, middle:end] = row.weight
                position_ids[number, start:] = torch.arange(shape[1] - start)
                start = end
            position_ids[number, start:] = torch.arange(shape[1] - start)
            lengths[number] = start
        batch: dict[str, Any] = {"ids": [row.id for row in rows], "input_ids": input_ids, "labels": labels}
        if self.pack is None:
            batch["attention_mask"] = (torch.arange(shape[1]) < lengths.unsqueeze(1)).long()
        else:
            batch["position_ids"] = position_ids
        if any(row.weight != 1.0 for row in rows):
            batch["loss_weights"] = weights
        return batch


def packed(rows: Sequence[RALTRow], limit: int) -> list[list[RALTRow]]:
    """The rows in as few lists of at most `limit` tokens as first-fit-decreasing finds; a longer row stands alone."""
    bins: list[list[RALTRow]] = []
    for row in sorted(rows, key=len, reverse=True):  # stable: the same batch, the same bins
        free = next((held for held in bins if sum(map(len, held)) + len(row) <= limit), None)
        if free is None:
            bins.append([row])
        else:
            free.append(row)
    return bins


def check_rows(run: Run, rows: Sequence[RALTRow], resume: bool, weighting: Sequence[Any] = ()) -> None:
    """Keeps a digest of the training instances in the run's folder; a resumed run must have the same ones.

    Retrieval and tokenisation are done again for a resumed run, and its data order means nothing for other instances.

    Args:
        run: The run.
        rows: The training instances.
        resume: Whether the run goes on.
        weighting: The settings that their weights come from. The weights themselves may differ in their last digits.

    Raises:
        DataError: They differ, or the digest cannot be read.
    """
    path = run.dir / "ralt_rows.json"
    now: dict[str, Any] = {"rows": len(rows)}
    for part in ("ids", "prompt_ids", "response_ids"):
        values: list[Any] = [getattr(row, "id" if part == "ids" else part) for row in rows]
        now[part] = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    now["weighting"] = list(weighting)
    if not resume or not path.exists():
        if is_first() and (resume or not run.events()):  # a run that has events is not begun again
            atomic_write_json(path, now)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        kept = {"weighting": now["weighting"], **before}  # runs of earlier versions did not keep it
        kept = {part: kept[part] for part in now}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error!r}); start a new run") from error
    reasons = {
        "ids": "the questions, or how many passages are retrieved for each",
        "prompt_ids": "the prompts: another corpus, retriever, template or order of the passages",
        "response_ids": "the answers",
        "weighting": "passage_weights or weights_gamma",
    }
    differs = [reason for part, reason in reasons.items() if kept[part] != now[part]]
    if differs:
        raise DataError(
            f"{run.dir} cannot be resumed: it began with {kept['rows']} training instances, now there are "
            f"{now['rows']}, and they differ in {'; '.join(differs)}. Resume with the corpus, questions, retriever "
            "and settings of the beginning, or start a new run"
        )


def exchange_passages(examples: Sequence[QAExample], found: Sequence[Sequence[Any]], seed: int) -> list[list[Any]]:
    """The control: as many passages as were retrieved, but drawn from those retrieved for other questions.

    Raises:
        DataError: Too few questions for any question to get other passages than its own.
    """
    pool = {passage.id: passage for passages in found for passage in passages}
    exchanged = []
    for example, passages in zip(examples, found, strict=True):
        own = {passage.id for passage in passages} | set(example.supporting)
        others = [passage for identity, passage in pool.items() if identity not in own]
        if len(others) < len(passages):
            raise DataError(
                f'passages="random": only {len(others)} passages were retrieved for other questions than '
                f"{example.id!r}, {len(passages)} are needed"
            )
        exchanged.append(random.Random(f"{seed}:{example.id}").sample(others, len(passages)))
    return exchanged


def add_supporting(
    store: Any, examples: Sequence[QAExample], found: Sequence[Sequence[Any]], seed: int
) -> list[list[Any]]:
    """Puts a supporting passage in the place of a retrieved one, where retrieval found none of them.

    The place is drawn (seeded): always the last one would teach the model to read the last passage.
    """
    completed = []
    for example, retrieved in zip(examples, found, strict=True):
        passages = list(retrieved)
        supporting = [identity for identity in example.supporting if identity in store]
        if passages and supporting and not {passage.id for passage in passages} & set(example.supporting):
            place = random.Random(f"{seed}:{example.id}").randrange(len(passages))
            passages[place] = store.get(supporting[:1])[0]
        completed.append(passages)
    return completed
