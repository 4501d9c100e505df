"""What a run panel is given: settings (a form's, or as they are), a trainer of this kernel, or a run that is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ragkit.config import Config
from ragkit.job_commands import training_of
from ragkit.jobs import Job
from ragkit.run_text import as_command
from ragkit.runs import RunError
from ragkit.units import counted
from ragkit.widgets.run_view import shown_path
from ragkit.widgets.thread_run import Scores, ThreadRun


class Source:
    """What is to be trained.

    Args:
        given: What `RunPanel` was given.
        processes: Processes of torchrun.
        score: Scores a trainer's system.

    Attributes:
        form: Has `config` and `errors`; None for a trainer and for a run that is there.
        work: The `ThreadRun` of a trainer, or the `Job` of a run; None until a command is started.

    Raises:
        RunError: It is nothing that can be trained, or an option does not go with it.
    """

    def __init__(self, given: Any, processes: int, score: Callable[[], Scores] | None) -> None:
        self.form: Any = None
        self.work: Any = None
        self.processes = processes
        if isinstance(given, Job | ThreadRun):
            self.work = given
        elif isinstance(given, Config):
            training_of(given)
            self.form = _Settings(given)
        elif hasattr(given, "config") and hasattr(given, "errors"):
            training_of(given.config)
            self.form = given
        elif callable(getattr(given, "train", None)) and hasattr(given, "config"):
            self.work = ThreadRun(given, score)
        else:
            raise RunError(
                f"RunPanel: found {type(given).__name__}, expected a ConfigForm, settings of a training (LSRConfig, "
                "...) or a trainer (LSRTrainer, ...); RunPanel.attach opens a run folder"
            )
        if processes != 1 and self.form is None:
            raise RunError("RunPanel: processes goes with settings; a trainer of this kernel trains in this process")
        if score is not None and not self.in_thread:
            raise RunError("RunPanel: score goes with a trainer; a command scores before and after by itself")

    @property
    def in_thread(self) -> bool:
        """Whether it is a trainer of this kernel."""
        return isinstance(self.work, ThreadRun)

    def title(self) -> str:
        """What is trained, and how."""
        if self.in_thread:
            return f"{type(self.work.trainer).__name__}, trained in this kernel in the background"
        if self.form is None:
            return f"the run {shown_path(self.work.run.dir)}"
        how = "a process of its own" if self.processes == 1 else f"{self.processes} processes of torchrun"
        return f"python -m ragkit {training_of(self.form.config)}, trained in {how}"

    def command(self) -> str:
        """The shell line that would run; empty for what is no command."""
        if self.form is None:
            return ""
        return as_command(self.form.config, training_of(self.form.config), self.processes)

    def check(self) -> None:
        """Looks at the form.

        Raises:
            RunError: Fields are wrong; the message names them.
        """
        errors = list(self.form.errors) if self.form is not None else []
        if errors:
            fields = "; ".join(str(problem) for problem in errors[:5])
            count = counted(len(errors), "wrong field")
            raise RunError(f"not started: the form has {count}: {fields}")

    # ---- why a button is off; empty if it is not ----

    def why_no_start(self, state: str, goes_on: bool, why_no_resume: str) -> str:
        """Why nothing can be started."""
        if goes_on:
            return "a training goes on already; stop it first, or wait for its end"
        if self.in_thread:
            if state in ("stopped", "interrupted") and not why_no_resume:
                return "this trainer has a run that is not at its end; Resume goes on with it"
        elif self.form is None:
            return "this panel was opened on a run that is there; RunPanel(form) starts a new one"
        return ""

    def why_no_estimate(self, goes_on: bool, estimating: bool) -> str:
        """Why no estimate can be made."""
        if goes_on:
            return "the training goes on already; its remaining time is beside the progress bar"
        if self.form is None and not self.in_thread:
            return "this panel was opened on a run that is there; an estimate is made before a run starts"
        return "an estimate is being made" if estimating else ""


class _Settings:
    """Settings in the place of a form."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.errors: list[Any] = []


def why_no_stop(state: str, goes_on: bool) -> str:
    """Why nothing can be stopped."""
    if state == "stopping":
        return "it is stopping already"
    return "" if goes_on else "nothing is running"


def why_no_resume(state: str, goes_on: bool, why_not: str) -> str:
    """Why the run cannot be gone on with."""
    if goes_on:
        return "a training goes on already"
    return {"ready": "nothing was started yet; press Start", "finished": "the run is at its end"}.get(state, why_not)
