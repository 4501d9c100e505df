"""What the retriever and the teacher think of a question's passages, side by side."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ragkit.plots.plot import Plot
from ragkit.plots.style import (
    bar_look,
    cut,
    drawing,
    figures,
    legend_columns,
    new_figure,
    one_line,
    shorten,
)
from ragkit.units import counted

DIRECTIONS = ("KL(P_R||Q_LM)", "KL(Q_LM||P_R)")
QUESTIONS = 4  # shown if there are more
PASSAGES = 24  # of a question; of more, those that have most of either distribution
ID_WIDTH = 26


def distributions(
    lines: Any, config: Any = None, n: int = QUESTIONS, supporting: Mapping[str, Collection[str]] | None = None
) -> Plot:
    """Bars of P_R, the retriever's distribution over a question's passages, against Q_LM, the teacher's.

    The divergence that LSR makes small stands above each question. Bars of P_R are filled, those of Q_LM hatched.

    Args:
        lines: What `lsr_table` returns, its lines, or one of them. For what a training changed: label -> lines of the
            same questions, for example {"before": ..., "after": ...}; Q_LM is that of the last. An `LSRRow` has no
            P_R: of it only Q_LM is drawn.
        config: An `LSRConfig`; its direction says which divergence, its beta and score make Q_LM of an `LSRRow`.
        n: Questions shown at most, from the first.
        supporting: Question id -> ids of the passages that hold the answer; they are marked "(gold)".

    Returns:
        The picture.

    Raises:
        ValueError: No question, labels whose questions or passages differ, or rows without config.

    Example:
        >>> distributions(lsr_table(trainer, n=2), trainer.config)  # doctest: +SKIP
    """
    given = {str(k): _lines(v) for k, v in lines.items()} if isinstance(lines, Mapping) else {"": _lines(lines)}
    questions = _questions(given, config)
    shown = questions[: max(1, n)]
    places = [_largest(question) for question in shown]
    direction = str(getattr(config, "direction", DIRECTIONS[0]))
    columns = 1 if len(shown) == 1 else 2
    rows = math.ceil(len(shown) / columns)
    most = max(map(len, places))
    bars = 1 + len(shown[0]["retriever"])
    with drawing():
        figure = new_figure(0.75 + rows * (0.7 + most * (0.09 + 0.105 * bars)))
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        titles = [_title(question, direction, len(kept)) for question, kept in zip(shown, places, strict=True)]
        for axes, question, kept, title in zip(panels, shown, places, titles, strict=False):
            _draw_question(axes, question, kept, supporting or {})
            axes.set_title("\n".join("?" for _ in title))  # as high; a long one would make the panels narrow
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=legend_columns(labels, len(labels)))
        _fit_titles(figure, panels[: len(shown)], titles, columns)
    return Plot(figure, _words(shown, len(questions), direction), "P_R against Q_LM")


def _lines(lines: Any) -> list[Any]:
    if hasattr(lines, "lines"):
        lines = lines.lines
    return list(lines) if isinstance(lines, Sequence) else [lines]


def _questions(given: Mapping[str, Sequence[Any]], config: Any) -> list[dict[str, Any]]:
    """One dictionary a question: id, question, answer, ids [K], retriever (label -> [K]), teacher [K]."""
    last = list(given.values())[-1] if given else []
    if not last:
        raise ValueError("lines: there is no question to draw")
    found = []
    for place, line in enumerate(last):
        ids = _ids(line)
        retriever = {}
        for label, lines in given.items():
            same = lines[place] if place < len(lines) else None
            if same is None or same.id != line.id or _ids(same) != ids:
                raise ValueError(
                    f"{label}: question {place + 1} is not {line.id!r} with the same passages as in the other labels"
                )
            if hasattr(same, "retriever"):
                retriever[label] = np.asarray(same.retriever, np.float64)  # [K]
        teacher = np.asarray(line.teacher, np.float64) if hasattr(line, "teacher") else _teacher(line, config)
        found.append(
            {
                "id": str(line.id),
                "question": str(line.question),
                "answer": str(getattr(line, "answer", "")),
                "ids": ids,
                "retriever": retriever,
                "teacher": teacher,
            }
        )
    return found


def _ids(line: Any) -> list[str]:
    """Ids of the passages; a line of `lsr_table` has "id: text"."""
    if hasattr(line, "passage_ids"):
        return [str(i) for i in line.passage_ids]
    return [str(passage).split(": ", 1)[0] for passage in line.passages]


def _teacher(row: Any, config: Any) -> np.ndarray:
    """Q_LM = softmax(v / beta) of an `LSRRow`, [K]; v is the log score, or its exponential (see `teacher_values`)."""
    if config is None:
        raise ValueError("config: rows hold scores of the LM; to make Q_LM of them, give the LSRConfig")
    values = np.asarray(row.lm_scores, np.float64)
    if config.score in ("token_prob", "prob"):
        values = np.exp(values)
    weights = np.exp((values - values.max()) / config.beta)
    return weights / weights.sum()


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p||q) = sum p log(p / q) in nats; infinite where q is 0 and p is not; NaN where a probability is."""
    if np.isnan(p).any() or np.isnan(q).any():
        return math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)
    return max(0.0, float(terms.sum()))


def _kl(question: Mapping[str, Any], label: str, direction: str) -> float:
    p, q = question["retriever"][label], question["teacher"]
    return divergence(p, q) if direction == DIRECTIONS[0] else divergence(q, p)


def _largest(question: Mapping[str, Any]) -> np.ndarray:
    """Places of the passages that are drawn, as they come."""
    both = np.max([*question["retriever"].values(), question["teacher"]], axis=0)  # [K]
    return np.sort(np.argsort(-both, kind="stable")[:PASSAGES])


def _draw_question(
    axes: Any, question: Mapping[str, Any], kept: np.ndarray, supporting: Mapping[str, Collection[str]]
) -> None:
    series = [(_p_name(label), values[kept]) for label, values in question["retriever"].items()]
    series.append(("Q_LM, teacher", question["teacher"][kept]))
    places = np.arange(len(kept))
    height = 0.84 / len(series)
    for number, (name, values) in enumerate(series):
        at = places + (number - (len(series) - 1) / 2) * height
        # Q_LM is always hatched; P_R is grey before and blue after, or blue where there is only one.
        look = 3 if number == len(series) - 1 else 2 if number == len(series) - 2 else 0
        axes.barh(at, values, height * 0.94, **bar_look(look) | _hatched(look), label=name)
    gold = {str(i) for i in supporting.get(question["id"], ())}
    ids = [question["ids"][place] for place in kept]
    names = [f"{shorten(i, ID_WIDTH)}{' (gold)' if i in gold else ''}" for i in ids]
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("probability")
    axes.grid(axis="x")


def _title(question: Mapping[str, Any], direction: str, kept: int) -> tuple[str, ...]:
    """Question, with its answer behind the last arrow, and divergences."""
    answer = f" → {cut(question['answer'], 16)}" if question["answer"] else ""
    first, total = one_line(question["question"]) + answer, len(question["ids"])
    divergences = [
        f"{label + ' ' if label else ''}{_nats(_kl(question, label, direction))}" for label in question["retriever"]
    ]
    second = [f"{direction.replace('||', ' ‖ ')}: {', '.join(divergences)} nats"] if divergences else []
    second += [f"the largest {kept} of {total:,} passages"] if kept < total else []
    return (first, "; ".join(second)) if second else (first,)


def _fit_titles(figure: Any, panels: Sequence[Any], titles: Sequence[tuple[str, ...]], columns: int) -> None:
    """Titles begin where the passages' names do, and end before the next panel or the picture does."""
    for _ in range(2):  # as `Plot` does; titles need places that stay
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    boxes = [axes.yaxis.get_tightbbox() for axes in panels]
    gap = 0.2 * figure.dpi
    for place, (axes, lines, box) in enumerate(zip(panels, titles, boxes, strict=True)):
        last = place % columns == columns - 1 or place + 1 == len(panels)
        right = (figure.bbox.x1 if last else boxes[place + 1].x0) - gap
        inside = axes.get_window_extent()
        text = axes.set_title("\n".join(lines), x=(box.x0 - inside.x0) / inside.width)
        question, arrow, answer = lines[0].rpartition(" → ")
        question, end = (question, arrow + answer) if arrow else (lines[0], "")
        chars = len(question)
        while chars > 8 and text.get_window_extent().x1 > right:
            chars -= 1
            text.set_text("\n".join([cut(question, chars) + end, *lines[1:]]))


def _hatched(look: int) -> dict[str, str]:
    return {"hatch": "////"} if look == 3 else {}


def _p_name(label: str) -> str:
    return f"P_R, {shorten(label, 32)}" if label else "P_R, retriever"


def _nats(value: float) -> str:
    return "infinite" if math.isinf(value) else figures(value)


def _words(shown: Sequence[Mapping[str, Any]], total: int, direction: str) -> str:
    parts = []
    for question in shown:
        words = [f"Q_LM is largest for {_favourite(question, question['teacher'])}"]
        for label, values in question["retriever"].items():
            kl = _nats(_kl(question, label, direction))
            words.append(f"{_p_name(label)}, for {_favourite(question, values)}, {direction} {kl} nats")
        many = counted(len(question["ids"]), "passage")
        parts.append(f"{cut(question['question'], 80)} ({many}): {'; '.join(words)}.")
    some = f" ({len(shown)} of {total:,} questions)" if total > len(shown) else ""
    return f"The retriever's and the teacher's distributions{some}. {' '.join(parts)}"


def _favourite(question: Mapping[str, Any], values: np.ndarray) -> str:
    if np.isnan(values).any():
        return "none (not a number)"
    best = int(values.argmax())
    return f"{shorten(question['ids'][best], ID_WIDTH)} ({values[best]:.2f})"
