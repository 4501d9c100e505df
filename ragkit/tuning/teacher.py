"""The LSR teacher: how likely the language model finds the right response after each retrieved passage.

The language model does not change while the retriever is trained, and the candidates only where they are refreshed
(`ragkit.tuning.refresh`): everything else is computed once, before the first step, and kept in the run's folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ragkit.config import LSRConfig
from ragkit.files import atomic_dir, atomic_write_json
from ragkit.notes import note
from ragkit.prompts import PromptError
from ragkit.rag.loading import digests
from ragkit.tuning.lsr_objective import LOG_SCORE
from ragkit.tuning.qa_data import DataError, QAExample
from ragkit.tuning.scoring import has_no_token, score_passages

# (example, its retrieved passages) -> one score in nats per passage, higher where the passage helps more
TeacherFunction = Callable[[QAExample, Sequence[Any]], Sequence[float]]
Teacher = Literal["lm", "shuffled"] | TeacherFunction
FOLDER = "lm_scores"
NOT_FINITE = (
    "the language model's numbers overflow: load it in float32 or bfloat16 (rag.dtype), or look at the weights"
)


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
        DataError: The teacher gives another number of scores than there are passages, or one that is not finite.
    """
    usable, left_out = _usable(system.generator, examples, config, teacher)
    retrieved = system.retriever.retrieve([example.question for example in usable], config.top_k)
    left_out += [
        (example.id, f"{len(found)} passage retrieved, at least 2 are needed")
        for example, found in zip(usable, retrieved, strict=True)
        if len(found) < 2
    ]
    pairs = [(example, found) for example, found in zip(usable, retrieved, strict=True) if len(found) >= 2]
    started = time.perf_counter()
    rows = make_rows(pairs, teacher_scores(system.generator, pairs, config, teacher))
    if not callable(teacher):
        count = sum(len(row.lm_scores) for row in rows)
        seconds = time.perf_counter() - started  # few where most scores were kept on disk
        note(f"{count} (question, passage) pairs have the LM's scores, made or read in {seconds:.1f} s")
    return (shuffle_scores(rows, config.train.seed) if teacher == "shuffled" else rows), left_out


def _usable(
    generator: Any, examples: Sequence[QAExample], config: LSRConfig, teacher: Teacher
) -> tuple[list[QAExample], list[tuple[str, str]]]:
    """The questions that can be scored, and (id, reason) of the others."""
    usable, left_out = [], []
    for example in examples:
        problem = "no answer" if not example.answer else None
        if problem is None and not callable(teacher):
            problem = _problem(generator, example, config)
        if problem is None:
            usable.append(example)
        else:
            left_out.append((example.id, problem))
    return usable, left_out


def _problem(generator: Any, example: QAExample, config: LSRConfig) -> str | None:
    """Why the language model cannot score passages for a question."""
    if has_no_token(generator, example):
        # With the EOS token alone, the LM would be asked how likely it says nothing.
        return f"the answer {example.answer!r} has no token"
    response = generator.encode_response(example.answer, eos=config.include_eos, template=config.prompt)
    try:
        generator.encode_prompt(config.prompt, example.question, [""], reserve=len(response))
    except PromptError as error:  # no room even for an empty passage
        return str(error)
    return None


def teacher_scores(
    generator: Any,
    pairs: Sequence[tuple[QAExample, Sequence[Any]]],
    config: LSRConfig,
    teacher: Teacher,
    at_once: bool = False,
) -> list[list[float]]:
    """The scores in nats of each question's passages, checked.

    Args:
        generator: A `Generator`; asked unless the teacher is a function.
        pairs: N questions with their passages.
        config: As in `build_rows`.
        teacher: As in `build_rows`; "shuffled" gives the LM's scores, not yet permuted.
        at_once: As in `score_passages`.

    Raises:
        DataError: As in `build_rows`.
    """
    if callable(teacher):
        scores = [[float(value) for value in teacher(example, found)] for example, found in pairs]
    else:
        # Always a logarithm: `teacher_values` takes the exponential, if one is wanted.
        logs = config.model_copy(update={"score": LOG_SCORE[config.score]})
        scores = score_passages(generator, pairs, logs, at_once)
    for (example, found), values in zip(pairs, scores, strict=True):
        if len(values) != len(found):
            raise DataError(f"the teacher gave {len(values)} scores for {len(found)} passages of {example.id!r}")
        for passage, value in zip(found, values, strict=True):
            if not math.isfinite(value):
                raise DataError(
                    f"question {example.id!r}, passage {passage.id!r}: the teacher's score is {value}, a finite "
                    "number is needed; " + ("look at the function" if callable(teacher) else NOT_FINITE)
                )
    return scores


def make_rows(pairs: Sequence[tuple[QAExample, Sequence[Any]]], scores: Sequence[Sequence[float]]) -> list[LSRRow]:
    """Rows of questions, passages and scores, the latter rounded to float32.

    That is how they are kept: a resumed run trains on exactly the same numbers.
    """
    rows = []
    for (example, found), values in zip(pairs, scores, strict=True):
        rounded = torch.tensor(values, dtype=torch.float32).tolist()
        rows.append(LSRRow(example.id, example.question, tuple(p.id for p in found), tuple(rounded)))
    return rows


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


class KeptRows(NamedTuple):
    """What `save_rows` kept: the rows, (question id, reason) of what was left out, and the factor of the scores."""

    rows: list[LSRRow]
    left_out: list[tuple[str, str]]
    scale: float


def save_rows(
    path: Path, key: dict[str, str], rows: Sequence[LSRRow], left_out: Sequence[tuple[str, str]], scale: float = 1.0
) -> None:
    """Keeps rows as a folder in a run: `rows.json` and `scores.safetensors`, atomically.

    Args:
        path: The folder; what it held goes.
        key: From `content_key`.
        rows: The rows.
        left_out: (question id, reason) of the questions that are not in them.
        scale: What the retriever's scores are multiplied by (`score_scale`).
    """
    flat = torch.tensor([score for row in rows for score in row.lm_scores], dtype=torch.float32)  # [sum of K]
    listed = [{"id": row.id, "question": row.question, "passage_ids": row.passage_ids} for row in rows]
    with atomic_dir(path) as temporary:
        save_file({"lm_scores": flat}, temporary / "scores.safetensors")
        atomic_write_json(
            temporary / "rows.json", {"key": key, "rows": listed, "left_out": left_out, "score_scale": scale}
        )


def load_rows(path: Path, key: dict[str, str]) -> KeptRows | None:
    """The rows that `save_rows` kept; None if the run ended before they were made.

    Raises:
        DataError: They are corrupt, or were made from other data, settings or another language model.
    """
    if not path.exists():
        return None
    try:
        saved = json.loads((path / "rows.json").read_text(encoding="utf-8"))
        values = load_file(path / "scores.safetensors")["lm_scores"].tolist()
        count = sum(len(row["passage_ids"]) for row in saved["rows"])
        if count != len(values):
            raise ValueError(f"{len(values)} scores for {count} passages")
        scores = iter(values)
        rows = [
            LSRRow(
                row["id"], row["question"], tuple(row["passage_ids"]), tuple(islice(scores, len(row["passage_ids"])))
            )
            for row in saved["rows"]
        ]
        left_out = [(str(identity), str(reason)) for identity, reason in saved["left_out"]]
        scale = float(saved["score_scale"])
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
    return KeptRows(rows, left_out, scale)


def content_key(examples: Sequence[QAExample], config: LSRConfig, teacher: Teacher, generator: Any) -> dict[str, str]:
    """What the rows depend on, as digests by name, so that a mismatch can be named.

    The retriever is left out: it is what training changes, and a run is resumed with the candidates that the initial
    one found.
    """
    kind = "function" if callable(teacher) else teacher
    settings = [config.top_k, config.prompt, config.score, config.include_eos, config.train.seed, kind]
    settings += [config.rescale, config.refresh_steps]
    chat = [generator.chat_template, generator.system_prompt]
    return {
        "questions": _digest([[example.id, example.question, example.answer] for example in examples]),
        "settings": _digest(settings),
        "language model": "" if callable(teacher) else _digest([chat, sorted(digests(generator.model).elements())]),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]
