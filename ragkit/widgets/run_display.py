"""The widgets of a run panel, and how what is known of a run gets into them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from ragkit.run_state import RunState
from ragkit.units import counted
from ragkit.widgets import run_view as view
from ragkit.widgets.base import escape, set_tooltip, widgets
from ragkit.widgets.run_words import where_words

SLOW = 1.0  # seconds between two looks at memory and log, and two pictures
SLOWEST = 5.0  # seconds between two pictures at most
BUSY = ("starting", "running", "stopping")
TIPS = {
    "start": "Trains in a new run folder",
    "stop": "Ends the training after its step, with a checkpoint",
    "resume": "Goes on from the last checkpoint",
    "estimate": "Time and memory, from a few real steps",
}


class RunDisplay:
    """Buttons, progress bar, picture, tables and log of a run panel; `children` are they, from top to bottom."""

    def __init__(self) -> None:
        self.buttons = {
            name: widgets.Button(description=name.capitalize(), icon=icon)
            for name, icon in (
                ("start", "play"),
                ("stop", "stop"),
                ("resume", "step-forward"),
                ("estimate", "clock-o"),
            )
        }
        self.progress = widgets.IntProgress(value=0, min=0, max=1, layout=widgets.Layout(width="260px"))
        self.title, self.said, self.words, self.machine, self.estimate = (widgets.HTML() for _ in range(5))
        self.picture, self.tables, self.log, self.where = (widgets.HTML() for _ in range(4))
        row = widgets.Layout(flex_flow="row wrap")
        self._bar = widgets.HBox(
            [self.progress, self.words], layout=widgets.Layout(display="none", align_items="center")
        )
        self.children = (
            self.title,
            widgets.HBox(list(self.buttons.values()), layout=row),
            self.said,
            self._bar,
            self.machine,
            self.estimate,
            self.picture,
            self.tables,
            self.log,
            self.where,
        )
        self._slow_at = self._picture_at = 0.0
        self._drawn = -1

    def begin(self) -> None:
        """Takes away what is of an earlier run."""
        self._drawn = -1
        self.tables.value = self.picture.value = ""

    def say(self, state: str, message: str) -> None:
        """Shows the state and its sentence."""
        set_value(self.said, view.state_html(state, message))

    def show_head(self, title: str, state: str, message: str, reasons: dict[str, str]) -> None:
        """Shows title, sentence and buttons; a button with a reason is off, and says why."""
        set_value(self.title, f'<div style="line-height: 1.5"><b>{escape(title)}</b></div>')
        self.say(state, message)
        for name, reason in reasons.items():
            button = self.buttons[name]
            if button.disabled != bool(reason):
                button.disabled = bool(reason)
            set_tooltip(button, f"Off: {reason}" if reason else TIPS[name])

    def show_progress(self, status: RunState, events: Any, state: str) -> None:
        """Shows how far the training is."""
        total = max(1, status.total or 1)
        if self.progress.max != total:
            self.progress.max = total
        self.progress.value = min(status.step, total)
        self.progress.bar_style = {"finished": "success", "failed": "danger"}.get(state, "")
        words = view.progress_words(status, events, state in BUSY)
        set_value(self.words, view.quiet_html(words) if words else "")
        self._bar.layout.display = "flex" if words or state in BUSY else "none"

    def show_rest(self, work: Any, status: RunState, state: str, pids: Any, draw: Any, at_once: bool) -> None:
        """Shows memory, log and picture, where it is time for them.

        Args:
            work: The `Job` or `ThreadRun`.
            status: How it stands.
            state: The panel's state.
            pids: Called for the numbers of the processes whose memory counts.
            draw: Called for the picture.
            at_once: Shows them in any case.
        """
        now = time.monotonic()
        if at_once or now - self._slow_at > SLOW:
            self._slow_at = now
            processes = pids() if state in BUSY else []
            set_value(self.machine, view.quiet_html(view.machine_words(status.facts, processes, work.events)))
            self._show_log(work, state)
            set_value(self.where, view.quiet_html(where_words(work, state)))
        events = work.events.events
        if not (at_once or now > self._picture_at) or len(events) == self._drawn or not has_loss(events, 2):
            return
        self._drawn = len(events)
        try:
            set_value(self.picture, view.plot_html(draw()))
        except Exception as error:  # without matplotlib, say: the training is watched all the same
            set_value(self.picture, view.quiet_html(f"There is no picture of the losses: {error}"))
        # A picture takes a moment of a core that the training wants too: it is drawn a tenth of the time at most.
        self._picture_at = now + min(max(SLOW, 9 * (time.monotonic() - now)), SLOWEST)

    def _show_log(self, work: Any, state: str) -> None:
        lines = work.log(view.LINES)
        bad = work.events.bad
        if bad:
            lines = [*lines, f"note: {counted(bad, 'line')} of events.jsonl cannot be read; passed over"]
        set_value(self.log, view.log_html(lines) if lines or state in BUSY else "")


def has_loss(events: Iterable[dict[str, Any]], least: int = 1) -> bool:
    """Whether there are losses to draw."""
    return sum(event.get("loss") is not None for event in events) >= least


def set_value(widget: Any, value: str) -> None:
    """Sends a text to the front end only if it is another one."""
    if widget.value != value:
        widget.value = value
