"""The run panel: starts, watches, stops and resumes a training, while the notebook stays free."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ragkit import jobs, plots
from ragkit.config import Config
from ragkit.evaluation import Comparison
from ragkit.jobs import Job, training_of
from ragkit.run_state import RunState
from ragkit.run_text import as_command
from ragkit.runs import RunError
from ragkit.widgets import run_view as view
from ragkit.widgets.base import StaticBox, code_html, escape, set_tooltip, widgets
from ragkit.widgets.estimating import Estimating
from ragkit.widgets.run_words import message_of, where_words
from ragkit.widgets.thread_run import Scores, ThreadRun, of_this_kernel

POLL = 0.25  # seconds between two looks at the files
SLOW = 1.0  # seconds between two looks at memory and log, and two pictures
BUSY = ("starting", "running", "stopping")


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
        self._form: Any = None
        self._work: Any = None
        self.processes = processes
        if isinstance(source, Job | ThreadRun):
            self._work = source
        elif isinstance(source, Config):
            training_of(source)
            self._form = _Settings(source)
        elif hasattr(source, "config") and hasattr(source, "errors"):
            training_of(source.config)
            self._form = source
        elif callable(getattr(source, "train", None)) and hasattr(source, "config"):
            self._work = ThreadRun(source, score)
        else:
            raise RunError(
                f"RunPanel: found {type(source).__name__}, expected a ConfigForm, settings of a training (LSRConfig, "
                "...) or a trainer (LSRTrainer, ...); RunPanel.attach opens a run folder"
            )
        if processes != 1 and self._form is None:
            raise RunError(
                "RunPanel: processes goes with settings; a trainer of this kernel trains in this one process"
            )
        if score is not None and not isinstance(self._work, ThreadRun):
            raise RunError("RunPanel: score goes with a trainer; a command scores before and after by itself")
        self._lock = threading.RLock()
        self._watcher: threading.Thread | None = None
        self._stop_asked = False
        self._status = RunState("new")
        self._state, self._message = "ready", ""
        self._estimating = Estimating(self._show_estimate)
        self._slow_at = self._plot_at = 0.0
        self._plotted = -1
        self._why_not = ""  # why it cannot be resumed
        self._build()
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
        path = jobs.latest(root, command)
        if path is None:
            kind = f" of the command {command}" if command else ""
            raise RunError(f'there is no run{kind} in "{root}" yet; start one with RunPanel(form)')
        return cls.attach(path)

    # ---- what it looks like ----

    def _build(self) -> None:
        button = lambda text, icon: widgets.Button(description=text, icon=icon)  # noqa: E731
        self.start_button = button("Start", "play")
        self.stop_button = button("Stop", "stop")
        self.resume_button = button("Resume", "step-forward")
        self.estimate_button = button("Estimate", "clock-o")
        for each, act in (
            (self.start_button, self.start),
            (self.stop_button, self.stop),
            (self.resume_button, self.resume),
            (self.estimate_button, self.estimate),
        ):
            each.on_click(lambda _, act=act: self._click(act))
        self.progress = widgets.IntProgress(value=0, min=0, max=1, layout=widgets.Layout(width="260px"))
        self._progress_words, self._head, self._said = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._machine, self._estimate, self._where = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._picture, self._tables, self._log = widgets.HTML(), widgets.HTML(), widgets.HTML()
        row = widgets.Layout(flex_flow="row wrap")
        buttons = [self.start_button, self.stop_button, self.resume_button, self.estimate_button]
        self.children = (
            self._head,
            widgets.HBox(buttons, layout=row),
            self._said,
            widgets.HBox([self.progress, self._progress_words], layout=row),
            self._machine,
            self._estimate,
            self._picture,
            self._tables,
            self._log,
            self._where,
        )

    def _title(self) -> str:
        if isinstance(self._work, ThreadRun):
            return f"{type(self._work.trainer).__name__}, trained in this kernel in the background"
        if self._form is None:
            return f"the run {view.shown_path(self._work.run.dir)}"
        command = training_of(self._form.config)
        how = "a process of its own" if self.processes == 1 else f"{self.processes} processes of torchrun"
        return f"python -m ragkit {command}, trained in {how}"

    def _command(self) -> str:
        if self._form is None:
            return ""
        return as_command(self._form.config, training_of(self._form.config), self.processes)

    def static_text(self) -> str:
        """What would run, how it stands, and how to start it in code."""
        lines = [f"RunPanel: {self._title()}", f"state: {self._state}"]
        if self._command():
            lines.append(f"runs: {self._command()}")
        lines.append(f"in code: {self._in_code()}")
        return "\n".join(lines)

    def static_html(self) -> str:
        """The same as `static_text`, as HTML."""
        command = code_html(self._command(), "The command that the panel runs") if self._command() else ""
        return (
            f"<div><b>{escape(self._title())}</b></div>{command}"
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
        return None if self._work is None or self._work.run is None else self._work.run.dir

    @property
    def result(self) -> Any:
        """A trainer's `TrainResult`, or the numbers of the run's `metrics.json`; None if there are none."""
        if isinstance(self._work, ThreadRun):
            return self._work.result
        with suppress(RunError):
            return (self._work.run.metrics() or None) if self._work is not None else None
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
        if self._work is not None:
            self._work.events.read()
        events = self._work.events.events if self._work is not None else []
        if not any(event.get("loss") is not None for event in events):
            raise RunError("there is nothing to draw yet: the training has made no step")
        return plots.loss_curves({self.run_dir.name if self.run_dir else "run": list(events)})

    def start(self) -> None:
        """Starts the training in a new run folder.

        Raises:
            RunError: It goes on already, the form has wrong fields, or the folder cannot be made.
        """
        with self._lock:
            self._refresh()
            reason = self._why_no_start()
            if reason:
                raise RunError(reason)
            self._check_form()
            self._estimating.cancel()
            if isinstance(self._work, ThreadRun):
                self._work.start()
            else:
                self._work = Job.start(self._form.config, self.processes)
            self._begin()

    def resume(self) -> None:
        """Goes on with the run from its last checkpoint.

        Raises:
            RunError: It goes on already, or there is nothing to go on with.
        """
        with self._lock:
            self._refresh()
            reason = self._why_no_resume()
            if reason:
                raise RunError(reason)
            self._estimating.cancel()
            self._work.resume()
            self._begin()

    def stop(self) -> None:
        """Asks the training to end with a checkpoint; what comes before or after the training ends at once.

        Raises:
            RunError: Nothing goes on.
        """
        with self._lock:
            self._refresh()
            reason = self._why_no_stop()
            if reason:
                raise RunError(reason)
            self._stop_asked = True
            self._work.stop()
            self._refresh()
            self._watch()

    def estimate(self) -> None:
        """Says in the background what the run will take, from a few real steps."""
        with self._lock:
            if self._state in BUSY:
                raise RunError("the training goes on already; its remaining time is beside the progress bar")
            self._check_form()
            if isinstance(self._work, ThreadRun):
                self._estimating.of_trainer(self._work.trainer)
            elif self._form is not None:
                self._estimating.of_config(training_of(self._form.config), self._form.config)
            else:
                raise RunError("this panel was opened on a run that is there; an estimate is made before a run starts")
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
            error = getattr(self._work, "error", None)
            if error is not None and self._state == "failed":
                raise error
            raise RunError(self._sentence()) from error
        return self.result

    # ---- why a button is off ----

    def _why_no_start(self) -> str:
        if self._state in BUSY or (self._state == "missing" and self._work.alive):
            return "a training goes on already; stop it first, or wait for its end"
        if isinstance(self._work, ThreadRun):
            if self._state in ("stopped", "interrupted") and not self._why_not:
                return "this trainer has a run that is not at its end; Resume goes on with it"
        elif self._form is None:
            return "this panel was opened on a run that is there; RunPanel(form) starts a new one"
        return ""

    def _why_no_stop(self) -> str:
        if self._state == "stopping":
            return "it is stopping already"
        if self._state in BUSY or (self._state == "missing" and self._work.alive):
            return ""
        return "nothing is running"

    def _why_no_resume(self) -> str:
        if self._state in BUSY:
            return "a training goes on already"
        if self._state == "ready":
            return "nothing was started yet; press Start"
        if self._state == "finished":
            return "the run is at its end"
        return self._why_not

    def _check_form(self) -> None:
        errors = list(self._form.errors) if self._form is not None else []
        if errors:
            fields = "; ".join(str(problem) for problem in errors[:5])
            raise RunError(f"not started: the form has {_count(len(errors), 'wrong field')}: {fields}")

    def _click(self, act: Callable[[], None]) -> None:
        """A button's press: what is wrong is said in the panel, not raised into a log that nobody reads."""
        try:
            act()
        except Exception as error:
            self._say(str(error) or type(error).__name__)

    # ---- watching ----

    def _begin(self) -> None:
        self._stop_asked, self._plotted = False, -1
        self._tables.value = self._picture.value = ""
        self._refresh()
        self._watch()

    def _watch(self) -> None:
        if self._watcher is None or not self._watcher.is_alive():
            self._watcher = threading.Thread(target=self._look, name="ragkit run panel", daemon=True)
            self._watcher.start()

    def _look(self) -> None:
        while True:
            try:
                with self._lock:
                    self._refresh()
                    if self._stop_asked and self._state in ("stopping", "missing"):
                        self._work.stop()
                    if self._state not in BUSY and not self._work.alive:
                        self._refresh(last=True)
                        self._watcher = None  # within the lock: a start that comes now makes a new one
                        return
            except Exception as error:  # a panel that cannot read a file says so, and looks again
                with suppress(Exception):
                    self._say(f"the panel cannot show the run just now: {error}")
                    time.sleep(SLOW)
            time.sleep(POLL)

    def _refresh(self, last: bool = False) -> None:
        """Looks at the run's files, and shows what is new."""
        with self._lock:
            work = self._work
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
        if self._work is None or name == "new":
            return "ready"
        if name in ("starting", "running", "ending"):
            return "stopping" if self._stop_asked else "starting" if name == "starting" else "running"
        return name

    def _find_why_not(self) -> str:
        run = self._work.run
        if not run.config_path.is_file():
            return f"there is no run folder {view.shown_path(run.dir)} to go on with; start a new run"
        if isinstance(self._work, Job):
            return self._work.resumable()[1]
        return ""

    def _sentence(self) -> str:
        if self._state == "ready":
            where = "this kernel" if isinstance(self._work, ThreadRun) else "a process of its own"
            return f"Press Start: it trains in {where}, and the notebook stays free. In code: panel.run()"
        return message_of(self._state, self._work, self._status, self._why_not)

    def _say(self, message: str) -> None:
        self._message = message
        _set(self._said, view.state_html(self._state, message))

    def _show(self, whole: bool) -> None:
        work, state = self._work, self._state
        _set(self._head, f'<div style="line-height: 1.5"><b>{escape(self._title())}</b></div>')
        _set(self._said, view.state_html(state, self._message))
        for button, reason, tip in (
            (self.start_button, self._why_no_start(), "Trains in a new run folder"),
            (self.stop_button, self._why_no_stop(), "Ends the training after its step, with a checkpoint"),
            (self.resume_button, self._why_no_resume(), "Goes on from the last checkpoint"),
            (self.estimate_button, self._why_no_estimate(), "Time and memory, from a few real steps"),
        ):
            if button.disabled != bool(reason):
                button.disabled = bool(reason)
            set_tooltip(button, f"Off: {reason}" if reason else tip)
        if work is None:
            return
        total = max(1, self._status.total or 1)
        if self.progress.max != total:
            self.progress.max = total
        self.progress.value = min(self._status.step, total)
        self.progress.bar_style = {"finished": "success", "failed": "danger"}.get(state, "")
        words = view.progress_words(self._status, work.events, state in BUSY)
        _set(self._progress_words, view.quiet_html(words) if words else "")
        now = time.monotonic()
        if whole or now - self._slow_at > SLOW:
            self._slow_at = now
            self._show_slow()
        if whole or now - self._plot_at > SLOW:
            self._show_plot(now)
        if whole and state not in BUSY:
            _set(self._tables, view.tables_html(self.tables))

    def _show_slow(self) -> None:
        work, state = self._work, self._state
        pids = [] if state not in BUSY else [os.getpid()] if isinstance(work, ThreadRun) else work.pids()
        _set(self._machine, view.quiet_html(view.machine_words(self._status.facts, pids, work.events)))
        lines = work.log(view.LINES)
        if work.events.bad:
            lines = [*lines, f"note: {_count(work.events.bad, 'line')} of events.jsonl cannot be read; passed over"]
        _set(self._log, view.log_html(lines) if lines or state in BUSY else "")
        _set(self._where, view.quiet_html(where_words(work, state)))

    def _show_plot(self, now: float) -> None:
        events = self._work.events.events
        if not hasattr(plots, "loss_curves"):
            return
        if len(events) == self._plotted or not any(event.get("loss") is not None for event in events):
            return
        self._plotted = len(events)
        begin = time.monotonic()
        _set(self._picture, view.plot_html(self.plot()))
        # A picture takes a moment of a core that the training wants too: it is drawn a tenth of the time at most.
        self._plot_at = now + 9 * (time.monotonic() - begin)

    def _why_no_estimate(self) -> str:
        if self._state in BUSY:
            return "the training goes on already"
        if self._form is None and not isinstance(self._work, ThreadRun):
            return "an estimate is made before a run starts"
        return "an estimate is being made" if self._estimating.busy else ""

    def _show_estimate(self, html: str) -> None:
        _set(self._estimate, html)
        with suppress(Exception):
            self.estimate_button.disabled = bool(self._why_no_estimate())


class _Settings:
    """Settings in the place of a form."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.errors: list[Any] = []


def _set(widget: Any, value: str) -> None:
    """Sends a text to the front end only if it is another one."""
    if widget.value != value:
        widget.value = value


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
