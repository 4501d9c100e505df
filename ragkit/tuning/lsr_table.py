"""What the teacher says, in numbers and side by side with the retriever."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ragkit_kernels.lsr_loss import lm_distribution, retrieval_distribution
from torch import Tensor

from ragkit.lsr_config import LSRConfig
from ragkit.tables import text_table
from ragkit.tuning.candidates import collate
from ragkit.tuning.lsr_objective import teacher_values
from ragkit.tuning.qa_data import DataError
from ragkit.tuning.teacher import LSRRow

FLAT = 0.98  # share of log K from which on the teacher counts as flat
ENOUGH = 50  # questions from which on agreement with the retriever means something


class TeacherWarning(UserWarning):
    """The teacher's distributions say little: they are nearly uniform, or have nothing to do with the retriever's."""


@dataclass(frozen=True)
class TeacherSummary:
    """How much the teacher says.

    Attributes:
        questions: Number of rows.
        entropy: Mean of H(Q_LM) / log K over the rows: 1 where Q_LM is uniform, 0 where it is one passage.
        agreement: Share of rows whose most likely passage under Q_LM is the retriever's first.
        chance: Mean of 1 / K, what that share would be by chance.
    """

    questions: int
    entropy: float
    agreement: float
    chance: float

    def __str__(self) -> str:
        return (
            f"the entropy of Q_LM is {self.entropy:.3f} of log K on average, and the LM's favourite is the "
            f"retriever's first passage for {self.agreement:.1%} of {self.questions} questions (by chance: "
            f"{self.chance:.1%})"
        )

    @property
    def warning(self) -> str | None:
        """One line where there is little to learn from this teacher, else None."""
        if self.entropy > FLAT:
            return f"Q_LM is nearly uniform: {self}. A smaller beta, another score, prompt or LM would say more."
        deviation = math.sqrt(self.chance * (1 - self.chance) / max(1, self.questions))
        if self.questions >= ENOUGH and self.agreement < self.chance + 2 * deviation:
            return (
                f"the teacher may be noise: {self}. Look at lsr_table(trainer): does the LM answer these questions, "
                "and does its prompt show the passage?"
            )
        return None


def summarise_teacher(rows: Sequence[LSRRow], config: LSRConfig) -> TeacherSummary:
    """Entropy of Q_LM and its agreement with the order of retrieval.

    Args:
        rows: Rows with the passages in the retriever's order.
        config: beta and score are read.
    """
    entropies, agree, chance = 0.0, 0.0, 0.0
    for start in range(0, len(rows), 1024):
        batch = collate(rows[start : start + 1024])
        mask, q = batch["mask"], _teacher(batch, config)  # [B, K]
        count = mask.sum(-1).double()
        entropies += float((torch.special.entr(q.double()).sum(-1) / count.log()).sum())
        agree += float((q.argmax(-1) == 0).sum())
        chance += float((1 / count).sum())
    number = max(1, len(rows))
    return TeacherSummary(len(rows), entropies / number, agree / number, chance / number)


def _teacher(batch: dict[str, Any], config: LSRConfig) -> Tensor:
    return lm_distribution(teacher_values(batch["lm_scores"], config.score), config.beta, batch["mask"])


@dataclass(frozen=True)
class LSRLine:
    """A question in `LSRTable`: its passages, best retrieved first, with both distributions."""

    id: str
    question: str
    answer: str
    passages: tuple[str, ...]
    retriever: tuple[float, ...]
    teacher: tuple[float, ...]
    lm_scores: tuple[float, ...]


class LSRTable:
    """P_R beside Q_LM, question by question; a text by `print`, a table in a notebook.

    Attributes:
        lines: The questions.
        summary: Of all rows, not only of those shown.
    """

    def __init__(self, lines: Sequence[LSRLine], summary: TeacherSummary, score: str) -> None:
        self.lines, self.summary, self.score = list(lines), summary, score

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> LSRLine:
        return self.lines[index]

    def __repr__(self) -> str:
        parts = []
        for line in self.lines:
            rows = [["passage", "P_R", "", "Q_LM", "", self.score]]
            for text, p, q, score in zip(line.passages, line.retriever, line.teacher, line.lm_scores, strict=True):
                rows.append([_short(text, 50), f"{p:.3f}", _bar(p), f"{q:.3f}", _bar(q), f"{score:.3f}"])
            parts.append(f"{line.id}: {line.question} -> {line.answer}\n{text_table(rows)}")
        return "\n\n".join([*parts, str(self.summary)])

    def _repr_html_(self) -> str:
        parts = []
        for line in self.lines:
            rows = ""
            for text, p, q, score in zip(line.passages, line.retriever, line.teacher, line.lm_scores, strict=True):
                cell = f'<td style="text-align:left" title="{html.escape(text)}">{html.escape(_short(text, 80))}</td>'
                rows += f"<tr>{cell}{_html_bar(p, '#4878a8')}{_html_bar(q, '#d08030')}<td>{score:.3f}</td></tr>"
            title = html.escape(f"{line.id}: {line.question} → {line.answer}")
            head = f"<tr><th>passage</th><th>P_R</th><th>Q_LM</th><th>{html.escape(self.score)}</th></tr>"
            parts.append(f"<p><b>{title}</b></p><table><thead>{head}</thead><tbody>{rows}</tbody></table>")
        return "".join([*parts, f"<p>{html.escape(str(self.summary))}</p>"])


def lsr_table(trainer: Any, n: int = 5, ids: Sequence[str] | None = None) -> LSRTable:
    """The retriever's distribution, as it is now, beside the language model's.

    Before the training it shows what there is to learn, after it what was learnt.

    Args:
        trainer: An `LSRTrainer`; its rows are made if there are none yet.
        n: Rows shown, from the first.
        ids: Question ids, in place of the first n.

    Raises:
        DataError: An id that no row has.

    Example:
        >>> lsr_table(trainer, n=2)  # doctest: +SKIP
    """
    every, config = trainer.rows(), trainer.config
    shown = every[:n]
    if ids is not None:
        by_id = {row.id: row for row in every}
        unknown = [identity for identity in ids if identity not in by_id]
        if unknown:
            raise DataError(f"ids: no row has the id {unknown[0]!r}; rows begin with {', '.join(list(by_id)[:3])}")
        shown = [by_id[identity] for identity in ids]
    answers = {example.id: example.answer for example in trainer.data}
    lines = [_line(trainer, row, answers.get(row.id, ""), config) for row in shown]
    return LSRTable(lines, summarise_teacher(every, config), config.score)


def _line(trainer: Any, row: LSRRow, answer: str, config: LSRConfig) -> LSRLine:
    batch = collate([row])
    with torch.no_grad():
        scores = trainer.system.retriever.score(batch["questions"], batch["passage_ids"])  # [1, K]
    p = retrieval_distribution(scores.cpu() * trainer.score_scale(), config.gamma, batch["mask"])
    q = _teacher(batch, config)
    values = teacher_values(batch["lm_scores"], config.score)
    return LSRLine(
        row.id,
        row.question,
        answer,
        tuple(_texts(trainer.system.retriever, row.passage_ids)),
        *(tuple(part[0].tolist()) for part in (p, q, values)),
    )


def _texts(retriever: Any, ids: Sequence[str]) -> list[str]:
    store = getattr(retriever, "store", None)
    if store is None:
        return list(ids)
    return [f"{passage.id}: {passage.text}" for passage in store.get(list(ids))]


def _short(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _bar(share: float, width: int = 10) -> str:
    return ("█" * round(share * width)).ljust(width)


def _html_bar(share: float, color: str) -> str:
    bar = f'<span style="display:inline-block;height:0.7em;width:{80 * share:.0f}px;background:{color}"></span>'
    return f'<td style="text-align:left">{share:.3f} {bar}</td>'
