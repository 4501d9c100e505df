"""Hard negatives: while LSR trains, the candidates are retrieved anew with the retriever as it has become."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ragkit.lsr_config import LSRConfig
from ragkit.notes import note
from ragkit.processes import is_first
from ragkit.tuning.candidates import Candidates
from ragkit.tuning.qa_data import DataError, QAExample
from ragkit.tuning.teacher import LSRRow, Teacher, load_rows, make_rows, save_rows, shuffle_scores, teacher_scores

REFRESHED = "refreshed"
_STEP = re.compile(r"step-(\d+)")


def refresh_rows(
    system: Any, examples: Sequence[QAExample], rows: Sequence[LSRRow], config: LSRConfig, teacher: Teacher
) -> list[LSRRow]:
    """The same questions with the passages that the retriever finds now.

    Where the passage encoder is trained the index is made anew first; the retriever swaps it in once it is whole. Only
    pairs of question and passage that the rows do not hold yet are scored by the language model, which is frozen. A
    question for which fewer than two passages are found keeps its row.

    Args:
        system: A `RAGSystem`.
        examples: The training questions; those of `rows` must be among them.
        rows: The rows in force.
        config: As in `build_rows`, and train_part.
        teacher: As in `build_rows`.

    Returns:
        Rows in the order of `rows`.
    """
    started = time.perf_counter()
    retriever = system.retriever
    if config.train_part == "both":
        retriever.mark_stale()
        retriever.refresh()
    by_id = {example.id: example for example in examples}
    retrieved = retriever.retrieve([row.question for row in rows], config.top_k)
    kept = [row for row, found in zip(rows, retrieved, strict=True) if len(found) < 2]
    pairs = [(row, found) for row, found in zip(rows, retrieved, strict=True) if len(found) >= 2]
    known: dict[tuple[str, str], float] = {}
    if teacher == "lm":  # a function may change its mind, and shuffled scores are not of their passages
        known = {(r.id, p): s for r in rows for p, s in zip(r.passage_ids, r.lm_scores, strict=True)}
    open_pairs = [(by_id[row.id], [p for p in found if (row.id, p.id) not in known]) for row, found in pairs]
    open_pairs = [(example, found) for example, found in open_pairs if found]
    scores = teacher_scores(system.generator, open_pairs, config, teacher, at_once=True)  # a resumed run's own bits
    for (example, found), values in zip(open_pairs, scores, strict=True):
        known |= {(example.id, passage.id): value for passage, value in zip(found, values, strict=True)}
    new = make_rows(
        [(by_id[row.id], found) for row, found in pairs],
        [[known[row.id, passage.id] for passage in found] for row, found in pairs],
    )
    if teacher == "shuffled":
        new = shuffle_scores(new, config.train.seed)
    order = {row.id: row for row in [*kept, *new]}
    _report(rows, [order[row.id] for row in rows], sum(len(found) for _, found in open_pairs), kept, started)
    return [order[row.id] for row in rows]


def _report(old: Sequence[LSRRow], new: Sequence[LSRRow], scored: int, kept: Sequence[LSRRow], started: float) -> None:
    fresh = sum(len(set(b.passage_ids) - set(a.passage_ids)) for a, b in zip(old, new, strict=True))
    total = sum(len(row.passage_ids) for row in new)
    stay = f"; {len(kept)} questions keep theirs, too little was found (first: {kept[0].id})" if kept else ""
    seconds = time.perf_counter() - started
    note(f"candidates retrieved anew in {seconds:.1f} s: {fresh} of {total} are new, {scored} pairs were scored{stay}")


def refresh_folder(run_dir: Path, step: int) -> Path:
    """Where a run keeps the rows that hold from the step after `step` on."""
    return run_dir / REFRESHED / f"step-{step}"


def drop_refreshes_after(run_dir: Path, step: int) -> None:
    """Removes the rows of refreshes after `step`, which a run resumed there makes again, and half-written ones."""
    for path in (run_dir / REFRESHED).glob("*"):
        match = _STEP.fullmatch(path.name)
        if match is None or int(match[1]) > step:
            shutil.rmtree(path)


class RefreshCallback(TrainerCallback):
    """Refreshes the candidates before the first step after every `every` steps.

    The rows of each refresh are kept in the run's folder, so that a run that is resumed later goes on with them. One
    that is resumed exactly at a refresh makes them again, from the same weights.

    Args:
        candidates: The rows in force; replaced.
        make: Gives the new rows for the old ones.
        run_dir: The run's folder.
        key: From `content_key`.
        every: Steps.
    """

    def __init__(
        self,
        candidates: Candidates,
        make: Callable[[list[LSRRow]], list[LSRRow]],
        run_dir: Path,
        key: dict[str, str],
        every: int,
    ) -> None:
        self.candidates, self.make, self.run_dir, self.key, self.every = candidates, make, run_dir, key, every
        self._at = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Replaces the rows where a refresh is due, or where a resumed run had one before."""
        step = state.global_step
        due = step - step % self.every
        if due == self._at:
            return
        path = refresh_folder(self.run_dir, due)
        kept = load_rows(path, self.key)
        if kept is not None:
            rows = kept.rows
        elif due == step:
            if due > self.every and self._at != due - self.every:  # resumed here: what was in force is one back
                before = load_rows(refresh_folder(self.run_dir, due - self.every), self.key)
                if before is not None:
                    self.candidates.replace(before.rows)
            rows = self.make(self.candidates.rows)
            if is_first():  # under torchrun every process makes them, one writes
                save_rows(path, self.key, rows, [])
        else:
            raise DataError(
                f"{path}: missing; the run cannot go on at step {step} without the candidates of step {due}. Resume "
                f"it from a checkpoint up to step {due}, or start a new run"
            )
        self.candidates.replace(rows)
        self._at = due
