"""The sentences of a run panel: what happened, and what to do next."""

from __future__ import annotations

from typing import Any

from ragkit.jobs import Job
from ragkit.run_state import RunState
from ragkit.runs import Run
from ragkit.units import rough_duration
from ragkit.widgets.run_view import progress_words, shown_path
from ragkit.widgets.thread_run import ThreadRun


def message_of(state: str, work: Any, status: RunState, can_resume: str) -> str:
    """The sentence for the person.

    Args:
        state: The panel's state.
        work: The `Job` or `ThreadRun`.
        status: How it stands.
        can_resume: Why it cannot be gone on with; empty if it can.
    """
    run: Run = work.run
    where = shown_path(run.dir)
    at = f"at step {status.step:,} of {status.total:,}" if status.total else "before its first step"
    if state == "starting":
        return _starting(work)
    if state == "running":
        if status.name == "ending":
            return "The training itself is done. " + _sentence(
                work.phase if _in_thread(work) else "scoring and saving"
            )
        words = progress_words(status, work.events, goes_on=True)
        return f"Training: {words or 'before its first step'}. The notebook is free meanwhile."
    if state == "stopping":
        if status.name == "ending":
            return "Stopping: the training itself is done."
        if status.name == "running":
            return "Stopping: the training ends after the step that it is in, and saves a checkpoint."
        return "Stopping: no step was made yet, so nothing is lost." if not status.step else "Stopping."
    if state == "stopped":
        if not status.step:
            return "Stopped before the first step; nothing was trained." + _go_on(can_resume, "begin")
        if status.step >= (status.total or 0):
            return "Stopped after the training, before it was scored and saved." + _go_on(can_resume, "do that")
        last = run.last_checkpoint()
        kept = f"{last.name} is in {where}/checkpoints" if last is not None else f"there is no checkpoint in {where}"
        return f"Stopped {at}; {kept}." + _go_on(can_resume)
    if state == "finished":
        took = work.events.last("elapsed")
        time = f" in {took:.0f} s" if took is not None and took < 90 else f" in {rough_duration(took)}" if took else ""
        return f"Finished: {status.step:,} steps{time}. Everything is in {where}."
    if state == "failed":
        return _failed(status, run, can_resume)
    if state == "missing":
        goes_on = " Its process still runs: press Stop to end it." if work.alive else ""
        return f"The run folder {where} is gone: it was deleted or moved, and what was trained with it.{goes_on}"
    last = run.last_checkpoint()
    kept = f"{last.name} is there" if last is not None else "there is no checkpoint, so it would begin again"
    why = status.error or "its process is gone (ended from outside, or the machine was restarted)"
    return f"Interrupted {at}: {why}; {kept}." + _go_on(can_resume)


def _starting(work: Any) -> str:
    if _in_thread(work):
        return "Starting: " + (work.phase or "preparing the training") + "."
    return "Starting: a process of its own loads the models and scores the system as it is; its log is below."


def _failed(status: RunState, run: Run, can_resume: str) -> str:
    error = _sentence(f"{status.error or 'the training ended with an error'}")
    if not status.step:
        how = "press Resume; with other settings, start a new run" if not can_resume else "start a new run"
        return f"Failed before the first step: {error} Put this right, and {how}."
    last = run.last_checkpoint()
    if last is None or can_resume:
        return f"Failed at step {status.step:,} of {status.total:,}: {error}"
    return (
        f"Failed after step {status.step:,} of {status.total:,}: {error} {last.name} is whole: once the cause is put "
        "right, Resume goes on from there."
    )


def _go_on(can_resume: str, verb: str = "go on") -> str:
    return f" {_sentence(can_resume)}" if can_resume else f" Press Resume to {verb}."


def _in_thread(work: Any) -> bool:
    return isinstance(work, ThreadRun)


def _sentence(text: str) -> str:
    """Text with a full stop, and a capital where it begins with a word."""
    text = text.strip()
    if not text:
        return ""
    text = text[0].upper() + text[1:] if text[:1].isalpha() and text.split()[0].isalpha() else text
    return text if text.endswith((".", "!", "?")) else text + "."


def where_words(work: Any, state: str) -> str:
    """Where the run is, and how to go on with it in a shell or in code."""
    if work is None or work.run is None:
        return ""
    where = shown_path(work.run.dir)
    words = f"run folder: {where}"
    if isinstance(work, Job):
        if not work.run.config_path.is_file():
            return f"log: {shown_path(work.folder / 'log.txt')}" if state == "failed" else ""
        if state == "finished":
            use = next((line for line in work.log(30) if line.startswith("use it:")), "")
            words += f" · {' '.join(use.split())}" if use else ""
        elif state in ("stopped", "interrupted", "failed") and work.resumable()[0]:
            many = work.processes()
            python = f"torchrun --nproc_per_node {many}" if many > 1 else "python"
            words += f" · in a shell: {python} -m ragkit {work.resumable()[0]} resume={where}"
        elif state in ("starting", "running", "stopping"):
            words += f' · later, or in another notebook: RunPanel.attach("{where}")'
    elif state in ("stopped", "interrupted"):
        words += " · in code: panel.resume(), or trainer.train(resume=True)"
    return words
