"""The run panel: starts, watches, stops and resumes a training, while the notebook stays free."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ragkit import plots
from ragkit.evaluation import Comparison
from ragkit.job_commands import training_of
from ragkit.job_search import latest
from ragkit.jobs import Job
from ragkit.run_state import RunState
from ragkit.runs import RunError
from ragkit.widgets import run_view as view
from ragkit.widgets.base import StaticBox, code_html, escape
from ragkit.widgets.estimating import Estimating
from ragkit.widgets.run_display import BUSY, RunDisplay, has_loss, set_value
from ragkit.widgets.run_source import Source, why_no_resume, why_no_stop
from ragkit.widgets.run_words import message_of
from ragkit.widgets.thread_run import Scores, ThreadRun, of_this_kernel

POLL = 0.25  # seconds between two looks at the files


class RunPanel(StaticBox):
    """Starts, watches, stops and resumes a training, while the notebook stays free.

    It reads the files of the run and nothing else, so it also watches a run that another process or another notebook
    began. Everything that a button does is a method too.

    Args:
        source: A `ConfigForm` or settings: the training is `python -m ragkit COMMAND` in a process of its own, which
            goes on when the notebook is closed. Or a trainer of this kernel (`LSRTrainer`, `RALTTrainer`,
            `GFMFinetuneTrainer`, `GFMPretrainTrainer`): it trains in a thread, and the kernel has the trained model.
        processes: Processes of torchrun on this machine; only for settings.
        score: Only for a trainer: scores the system before and after (`lambda: evaluate(system, test)`).

    Raises:
        RunError: `source` is none of these, or an option does not go with it.

    Example:
        >>> panel = RunPanel(form); panel  # doctest: +SKIP
        >>> panel.run()                    # the same without a click  # doctest: +SKIP
    """

    def __init__(self, source: Any, processes: int = 1, score: Callable[[], Scores] | None = None) -> None:
        super().__init__()
        self._source = Source(source, processes, score)
        self._lock = threading.RLock()
        self._watcher: threading.Thread | None = None
        self._stop_asked = self._closed = False
        self._status = RunState("new")
        self._state, self._message = "ready", ""
        self._estimating = Estimating(self._show_estimate)
        self._why_not = ""  # why it cannot be resumed
        self.display = RunDisplay()
        self.children = self.display.children
        buttons = self.display.buttons
        self.start_button, self.stop_button = buttons["start"], buttons["stop"]
        self.resume_button, self.estimate_button = buttons["resume"], buttons["estimate"]
        for name, button in buttons.items():
            button.on_click(lambda _, name=name: self._click(getattr(self, name)))
        self._refresh()
        if self._state in BUSY:
            self._watch()

    @classmethod
    def attach(cls, run_dir: str | Path) -> RunPanel:
        """A panel on a run that is there, whoever began it; it shows one that goes on live.

        Raises:
            RunError: There is no such run.
        """
        return cls(of_this_kernel(run_dir) or Job.attach(run_dir))

    @classmethod
    def latest(cls, root: str | Path = "runs", command: str | None = None) -> RunPanel:
        """A panel on the run that was begun last.

        Args:
            root: Folder that holds the run folders (`output_dir`).
            command: Only runs of this command ("lsr", "ralt", "gfm-pretrain", "gfm-finetune"); None: of any.

        Raises:
            RunError: There is none.
        """
        path = latest(root, command)
        if path is None:
            kind = f" of the command {command}" if command else ""
            raise RunError(f'there is no run{kind} in "{root}" yet; start one with RunPanel(form)')
        return cls.attach(path)

    # ---- without widgets ----

    def static_text(self) -> str:
        """What would run, how it stands, and how to start it in code."""
        lines = [f"RunPanel: {self._source.title()}", f"state: {self._state}"]
        if self._source.command():
            lines.append(f"runs: {self._source.command()}")
        lines.append(f"in code: {self._in_code()}")
        return "\n".join(lines)

    def static_html(self) -> str:
        """The same as `static_text`, as HTML."""
        command = (
            code_html(self._source.command(), "The command that the panel runs") if self._source.command() else ""
        )
        return (
            f"<div><b>{escape(self._source.title())}</b></div>{command}"
            f"<div>State: {escape(self._state)}. In code: <code>{escape(self._in_code())}</code></div>"
        )

    def _in_code(self) -> str:
        if self._state == "ready":
            return "panel.run() starts it and waits for its end"
        if self._state in BUSY:
            return "panel.wait() waits for its end, panel.stop() stops it with a checkpoint"
        return "panel.table has the scores, panel.resume() goes on with a run that was stopped"

    # ---- what one can do ----

    @property
    def state(self) -> str:
        """One of ready, starting, running, stopping, stopped, finished, failed, interrupted and missing."""
        return self._state

    @property
    def message(self) -> str:
        """The sentence shown to the person: what happened, and what to do next."""
        return self._message

    @property
    def run_dir(self) -> Path | None:
        """The run folder; None before the first start."""
        return None if self._source.work is None or self._source.work.run is None else self._source.work.run.dir

    @property
    def result(self) -> Any:
        """A trainer's `TrainResult`, or the numbers of the run's `metrics.json`; None if there are none."""
        if self._source.in_thread:
            return self._source.work.result
        with suppress(RunError):
            return (self._source.work.run.metrics() or None) if self._source.work is not None else None
        return None

    @property
    def tables(self) -> dict[str, Comparison]:
        """The scores before and after, by data set ("" where there is one only)."""
        return view.read_tables(self.run_dir) if self.run_dir is not None else {}

    @property
    def table(self) -> Comparison | None:
        """The scores before and after (of the first data set); None if there are none yet."""
        return next(iter(self.tables.values()), None)

    def plot(self) -> Any:
        """Loss, learning rate and metrics of the run so far.

        Raises:
            RunError: There is nothing to draw yet.
        """
        with self._lock:  # the watcher reads too
            if self._source.work is not None:
                self._source.work.events.read()
            events = list(self._source.work.events.events) if self._source.work is not None else []
        if not has_loss(events):
            raise RunError("there is nothing to draw yet: the training has made no step")
        return plots.loss_curves({self.run_dir.name if self.run_dir else "run": events})

    def start(self) -> None:
        """Starts the training in a new run folder.

        Raises:
            RunError: It goes on already, the form has wrong fields, or the folder cannot be made.
        """
        with self._lock:
            self._refresh()
            self._must_be_on("start")
            self._source.check()
            self._estimating.cancel()
            if self._source.in_thread:
                self._source.work.start()
            else:
                self._source.work = Job.start(self._source.form.config, self._source.processes)
            self._begin()

    def resume(self) -> None:
        """Goes on with the run from its last checkpoint.

        Raises:
            RunError: It goes on already, or there is nothing to go on with.
        """
        with self._lock:
            self._refresh()
            self._must_be_on("resume")
            self._estimating.cancel()
            self._source.work.resume()
            self._begin()

    def stop(self) -> None:
        """Asks the training to end with a checkpoint; what comes before or after the training ends at once.

        Raises:
            RunError: Nothing goes on.
        """
        with self._lock:
            self._refresh()
            self._must_be_on("stop")
            self._stop_asked = True
            self._source.work.stop()
            self._refresh()
            self._watch()

    def close(self) -> None:
        """Takes the panel from the screen, and no longer watches the run; the run goes on."""
        self._closed = True
        super().close()

    def estimate(self) -> None:
        """Says in the background what the run will take, from a few real steps."""
        with self._lock:
            self._must_be_on("estimate")
            self._source.check()
            if self._source.in_thread:
                self._estimating.of_trainer(self._source.work.trainer)
            else:
                self._estimating.of_config(training_of(self._source.form.config), self._source.form.config)
            self._refresh()

    def wait(self, timeout: float | None = None) -> str:
        """Waits until nothing goes on any more.

        The first interrupt of the kernel (■) asks the training to stop with a checkpoint, the second ends the waiting.

        Args:
            timeout: Seconds at most; None: as long as it takes.

        Returns:
            The state then.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        interrupted = False
        while (watcher := self._watcher) is not None and watcher.is_alive():
            if deadline is not None and time.monotonic() > deadline:
                break
            try:
                watcher.join(0.1)
            except KeyboardInterrupt:
                if interrupted or self._state not in BUSY:
                    raise
                interrupted = True
                with suppress(RunError):
                    self.stop()
        return self._state

    def run(self) -> Any:
        """Starts the training if nothing was started yet, and waits for its end.

        Returns:
            A trainer's `TrainResult`; of a command the numbers of the run's `metrics.json`, or None.

        Raises:
            RunError: A command that failed, was cut off, or whose folder is gone; the message says why.
            Exception: What ended a trainer's training.
        """
        if self._state == "ready":
            self.start()
        self.wait()
        if self._state in ("failed", "interrupted", "missing"):
            error = getattr(self._source.work, "error", None)
            if error is not None and self._state == "failed":
                raise error
            raise RunError(self._sentence()) from error
        return self.result

    def _click(self, act: Callable[[], None]) -> None:
        """A button's press: what is wrong is said in the panel, not raised into a log that nobody reads."""
        try:
            act()
        except Exception as error:
            self._say(str(error) or type(error).__name__)

    def _must_be_on(self, name: str) -> None:
        reason = self._reasons()[name]
        if self._state in BUSY:
            self._watch()  # it may have been begun elsewhere since
        if reason:
            raise RunError(reason)

    def _reasons(self) -> dict[str, str]:
        """Why each button is off; empty for one that is on."""
        state, source = self._state, self._source
        goes_on = state in BUSY or (state == "missing" and source.work.alive)
        no_stop = why_no_stop(state, goes_on)
        if source.in_thread and self._status.name == "ending" and not no_stop:
            no_stop = "the training itself is done, and what comes after it cannot be interrupted"
        no_resume = why_no_resume(state, goes_on, self._why_not)
        return {
            "start": source.why_no_start(state, goes_on, no_resume),
            "stop": no_stop,
            "resume": no_resume,
            "estimate": source.why_no_estimate(goes_on, self._estimating.busy),
        }

    # ---- watching ----

    def _begin(self) -> None:
        self._stop_asked = False
        self.display.begin()
        self._refresh()
        self._watch()

    def _watch(self) -> None:
        self._closed = False
        if self._watcher is None or not self._watcher.is_alive():
            self._watcher = threading.Thread(target=self._look, name="ragkit run panel", daemon=True)
            self._watcher.start()

    def _look(self) -> None:
        while True:
            try:
                with self._lock:
                    if self._closed:
                        self._watcher = None
                        return
                    self._refresh()
                    if self._stop_asked and self._state in ("stopping", "missing"):
                        self._source.work.stop()
                    if self._state not in BUSY and not self._source.work.alive:
                        self._refresh(last=True)
                        self._stop_asked = False  # whoever goes on with it begins anew
                        self._watcher = None  # within the lock: a start that comes now makes a new one
                        return
            except Exception as error:  # a panel that cannot read a file says so, and looks again
                with suppress(Exception):
                    self._say(f"the panel cannot show the run just now: {error}")
                    time.sleep(POLL)
            time.sleep(POLL)

    def _refresh(self, last: bool = False) -> None:
        """Looks at the run's files, and shows what is new."""
        with self._lock:
            work = self._source.work
            if work is not None:
                self._status = work.status()
            state = self._state_now()
            if work is not None and state not in (*BUSY, "ready", "finished"):
                self._why_not = self._find_why_not()
            ends = state not in BUSY and (self._state in BUSY or last)
            changed, self._state = state != self._state, state
            self._message = self._sentence()
            self._show(ends or changed or last)

    def _state_now(self) -> str:
        name = self._status.name
        if self._source.work is None or name == "new":
            return "ready"
        if name in ("starting", "running", "ending"):
            return "stopping" if self._stop_asked else "starting" if name == "starting" else "running"
        return name

    def _find_why_not(self) -> str:
        run = self._source.work.run
        if not run.config_path.is_file():
            return f"there is no run folder {view.shown_path(run.dir)} to go on with; start a new run"
        if isinstance(self._source.work, Job):
            return self._source.work.resumable()[1]
        return ""

    def _sentence(self) -> str:
        if self._state == "ready":
            where = "this kernel" if self._source.in_thread else "a process of its own"
            return f"Press Start: it trains in {where}, and the notebook stays free. In code: panel.run()"
        return message_of(self._state, self._source.work, self._status, self._why_not)

    def _say(self, message: str) -> None:
        self._message = message
        self.display.say(self._state, message)

    def _show(self, whole: bool) -> None:
        work, state, display = self._source.work, self._state, self.display
        display.show_head(self._source.title(), state, self._message, self._reasons())
        if work is None:
            return
        display.show_progress(self._status, work.events, state)
        if whole and state not in BUSY:
            set_value(display.tables, view.tables_html(self.tables))
        pids = (lambda: [os.getpid()]) if isinstance(work, ThreadRun) else work.pids
        display.show_rest(work, self._status, state, pids, self.plot, whole)

    def _show_estimate(self, html: str) -> None:
        set_value(self.display.estimate, html)
        with self._lock:
            self._refresh()
