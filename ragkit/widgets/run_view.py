"""What a run panel shows: words, tables and pictures as HTML, made from the files of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ragkit.evaluation import Comparison, EvaluationResult, compare
from ragkit.optional import require
from ragkit.run_state import EventReader, RunState
from ragkit.units import counted, rough_duration, size
from ragkit.widgets.base import BORDER, CODE, ERROR, QUIET, TEXT, escape

# A sign and a word for each state: nothing hangs on a colour.
SIGNS = {
    "ready": "○",
    "starting": "◔",
    "running": "▶",
    "stopping": "◕",
    "stopped": "■",
    "finished": "✓",
    "failed": "✗",
    "interrupted": "⚡",
    "missing": "?",
}
GOOD, BAD = ("finished",), ("failed", "interrupted", "missing")
LINES = 12  # of the log


def shown_path(path: str | Path) -> str:
    """A path relative to the working folder if it is in it."""
    path = Path(path)
    with suppress(ValueError):
        return path.absolute().relative_to(Path.cwd()).as_posix()
    return os.fspath(path)


def progress_words(state: RunState, events: EventReader, goes_on: bool) -> str:
    """Step, total and remaining time in words."""
    if not state.total:
        return ""
    words = f"step {state.step:,} of {state.total:,}"
    left = events.events[-1].get("remaining") if events.events else None
    if goes_on and left is not None and state.step < state.total:
        words += f", {rough_duration(left)} left"
    return words


def state_html(state: str, message: str) -> str:
    """The state as a sign and a word, with the sentence for the person; screen readers are told of it."""
    colour = ERROR if state in BAD else TEXT
    role = "alert" if state in BAD else "status"
    word, text = state.capitalize(), message
    if message.startswith(word):  # "Finished: 40 steps": the word stands once
        text = message.removeprefix(word)
    else:
        word += ". "
    return (
        f'<div role="{role}" style="line-height: 1.45; color: {TEXT}; overflow-wrap: anywhere">'
        f'<b style="color: {colour}"><span aria-hidden="true">{SIGNS[state]}</span> {escape(word)}</b>'
        f"{escape(text)}</div>"
    )


def quiet_html(text: str) -> str:
    """A line of lesser importance."""
    return f'<div style="line-height: 1.4; color: {QUIET}; overflow-wrap: anywhere">{escape(text)}</div>'


def log_html(lines: Iterable[str]) -> str:
    """The last lines that the training said."""
    text = "\n".join(lines) or "(nothing was said yet)"
    # Upside down, so that the last line is in sight where there is not room for all.
    return (
        f'<div role="log" aria-label="Last lines of the log" tabindex="0" style="display: flex; flex-direction: '
        f'column-reverse; max-height: 17em; overflow: auto; border: 1px solid {BORDER}">'
        f'<pre style="flex: none; margin: 0; padding: 6px 8px; line-height: 1.35; white-space: pre-wrap; '
        f'overflow-wrap: anywhere; font-family: {CODE}; font-size: 12px; color: {TEXT}">{escape(text)}</pre></div>'
    )


def plot_html(plot: Any) -> str:
    """A picture as inline SVG, in the page's colours and with its description for screen readers."""
    return f'<div style="max-width: 760px; overflow-x: auto">{plot.svg()}</div>'


def machine_words(facts: Mapping[str, Any], pids: Iterable[int], events: EventReader) -> str:
    """Where it computes, with what, and how much memory it takes."""
    words = []
    device = str(facts.get("device") or "")
    if device:
        threads, processes = facts.get("threads"), int(facts.get("processes") or 1)
        where = "CPU" if device == "cpu" else device
        if device == "cpu" and threads:
            where += f", {counted(threads, 'thread')}"
        words.append(where + (f", {processes} processes" if processes > 1 else ""))
    memory = memory_of(pids)
    if memory:
        words.append(f"memory {size(memory / 2**20)}")
    gpu = events.last("gpu_mib")
    if gpu is not None:
        words.append(f"GPU memory at most {size(gpu)}")
    return " · ".join(words)


def memory_of(pids: Iterable[int]) -> int:
    """Bytes of memory that processes take together; what they share is counted for each."""
    psutil = require("psutil")
    total = 0
    for pid in pids:
        with suppress(psutil.Error):
            total += psutil.Process(pid).memory_info().rss
    return total


# ---- before and after ----


def read_tables(run_dir: Path) -> dict[str, Comparison]:
    """The scores before and after of a run's `evaluation.json`, by data set ("" where there is one only)."""
    try:
        found = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
        groups = {"": found} if "before" in found else found
        return {name: _compare(group) for name, group in groups.items() if {"before", "after"} <= set(group)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _compare(group: Mapping[str, Any]) -> Comparison:
    before, after = (EvaluationResult.from_dict(group[when]) for when in ("before", "after"))
    return compare(before, after)


def tables_html(tables: Mapping[str, Comparison]) -> str:
    """Scores before and after, under a heading."""
    parts = []
    for name, table in tables.items():
        title = "Before and after the training" + (f": {name}" if name else "")
        parts.append(f'<div style="color: {TEXT}; line-height: 1.4"><b>{escape(title)}</b></div>')
        cells = table_html(table, "right")
        parts.append(f'<div style="color: {TEXT}; overflow-x: auto; line-height: 1.4">{cells}</div>')
    return "".join(parts)


def table_html(table: Any, align: str = "left") -> str:
    """What an object shows in Jupyter, with room between its cells: a widget has no style sheet for tables."""
    html = str(table._repr_html_())
    for cell in ("th", "td"):
        html = html.replace(f"<{cell}>", f'<{cell} style="padding: 1px 10px; text-align: {align}">')
    return html
