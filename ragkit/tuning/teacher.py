"""The LSR teacher: how likely the language model finds the right response after each retrieved passage.

Neither the language model nor (with a frozen passage side) the candidates change while the retriever is trained,
so everything here is computed once, before the first step, and kept in the run's folder.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ragkit.config import LSRConfig
from ragkit.files import atomic_dir, atomic_write_json
from ragkit.rag.loading import digests
from ragkit.tuning.qa_data import DataError, QAExample
from ragkit.tuning.scoring import score_passages

# (example, its retrieved passages) -> one score in nats per passage, higher where the passage helps more
TeacherFunction = Callable[[QAExample, Sequence[Any]], Sequence[float]]
Teacher = Literal["lm", "shuffled"] | TeacherFunction
FOLDER = "lm_scores"


@dataclass(frozen=True)
class LSRRow:
    """One question of the LSR training set.

    Attributes:
        id: The example's id.
        question: The question.
        passage_ids: K ids of the passages that the initial retriever found, best first.
        lm_scores: K teacher scores in nats, same order.
    """

    id: str
    question: str
    passage_ids: tuple[str, ...]
    lm_scores: tuple[float, ...]

    def __repr__(self) -> str:
        pairs = "\n".join(f"  {s:8.3f}  {p}" for p, s in zip(self.passage_ids, self.lm_scores, strict=True))
        return f"LSRRow({self.id}: {self.question}\n{pairs})"


def build_rows(
    system: Any, examples: Sequence[QAExample], config: LSRConfig, teacher: Teacher = "lm"
) -> tuple[list[LSRRow], list[tuple[str, str]]]:
    """Retrieves the top-k passages of each question once and scores them with the teacher.

    Args:
        system: A `RAGSystem`.
        examples: The training questions.
        config: top_k, prompt, score, include_eos, score_batch_size and train.seed are read.
        teacher: "lm"; "shuffled", the control that permutes the LM's scores within each question (seeded); or a
            function (example, passages) -> scores.

    Returns:
        (rows, [(question id, reason)] of the questions that cannot be used).

    Raises:
        DataError: A teacher function returns another number of scores than there are passages.
    """
    left_out = [(example.id, "no answer") for example in examples if not example.answer]
    examples = [example for example in examples if example.answer]
    retrieved = system.retriever.retrieve([example.question for example in examples], config.top_k)
    left_out += [
        (example.id, f"{len(found)} passage retrieved, at least 2 are needed")
        for example, found in zip(examples, retrieved, strict=True)
        if len(found) < 2
    ]
    pairs = [(example, found) for example, found in zip(examples, retrieved, strict=True) if len(found) >= 2]
    if callable(teacher):
        scores = [list(teacher(example, found)) for example, found in pairs]
    else:
        started = time.perf_counter()
        scores = score_passages(system.generator, pairs, config)
        count = sum(map(len, scores))
        print(f"scored {count} (question, passage) pairs with the LM in {time.perf_counter() - started:.1f} s")
    rows = []
    for (example, found), values in zip(pairs, scores, strict=True):
        if len(values) != len(found):
            raise DataError(f"the teacher gave {len(values)} scores for {len(found)} passages of {example.id!r}")
        # Rounded to float32, as they are kept: a resumed run trains on exactly the same numbers.
        rounded = torch.tensor(values, dtype=torch.float32).tolist()
        rows.append(LSRRow(example.id, example.question, tuple(p.id for p in found), tuple(rounded)))
    return (shuffle_scores(rows, config.train.seed) if teacher == "shuffled" else rows), left_out


def shuffle_scores(rows: Sequence[LSRRow], seed: int) -> list[LSRRow]:
    """The control teacher: the scores of each row permuted among its passages."""
    shuffled = []
    for row in rows:
        # The seed depends on the question, not on its place: the same control whatever rows stand before it.
        digest = hashlib.sha256(f"{seed}:{row.id}".encode()).digest()
        random = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        order = torch.randperm(len(row.lm_scores), generator=random).tolist()
        shuffled.append(LSRRow(row.id, row.question, row.passage_ids, tuple(row.lm_scores[i] for i in order)))
    return shuffled


def save_rows(folder: Path, key: dict[str, str], rows: Sequence[LSRRow], left_out: Sequence[tuple[str, str]]) -> None:
    """Keeps the rows in a run's folder: `lm_scores/rows.json` and `lm_scores/scores.safetensors`, atomically."""
    flat = torch.tensor([score for row in rows for score in row.lm_scores], dtype=torch.float32)  # [sum of K]
    listed = [{"id": row.id, "question": row.question, "passage_ids": row.passage_ids} for row in rows]
    with atomic_dir(folder / FOLDER) as temporary:
        save_file({"lm_scores": flat}, temporary / "scores.safetensors")
        atomic_write_json(temporary / "rows.json", {"key": key, "rows": listed, "left_out": left_out})


def load_rows(folder: Path, key: dict[str, str]) -> tuple[list[LSRRow], list[tuple[str, str]]] | None:
    """The rows that `save_rows` kept; None if the run ended before they were made.

    Raises:
        DataError: They are corrupt, or were made from other data, settings or another language model.
    """
    path = folder / FOLDER
    if not path.exists():
        return None
    try:
        saved = json.loads((path / "rows.json").read_text(encoding="utf-8"))
        scores = iter(load_file(path / "scores.safetensors")["lm_scores"].tolist())
        rows = []
        for row in saved["rows"]:
            values = tuple(next(scores) for _ in row["passage_ids"])
            rows.append(LSRRow(row["id"], row["question"], tuple(row["passage_ids"]), values))
        left_out = [(str(identity), str(reason)) for identity, reason in saved["left_out"]]
        different = [name for name, digest in key.items() if saved["key"][name] != digest]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{path}: the kept LM scores cannot be read ({error!r}); delete the folder to score again"
        ) from error
    if different:
        raise DataError(
            f"{path}: this run was started with other {' and '.join(different)}; resume it with the same ones, or "
            "start a new run"
        )
    return rows, left_out


def content_key(examples: Sequence[QAExample], config: LSRConfig, teacher: Teacher, generator: Any) -> dict[str, str]:
    """What the rows depend on, as digests by name, so that a mismatch can be named.

    The retriever is left out: it is what training changes, and a run is resumed with the candidates that the initial
    one found.
    """
    kind = "function" if callable(teacher) else teacher
    settings = [config.top_k, config.prompt, config.score, config.include_eos, config.train.seed, kind]
    chat = [generator.chat_template, generator.system_prompt]
    return {
        "questions": _digest([[example.id, example.question, example.answer] for example in examples]),
        "settings": _digest(settings),
        "language model": "" if callable(teacher) else _digest([chat, sorted(digests(generator.model).elements())]),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]
