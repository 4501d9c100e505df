"""The run of a training: a new folder, or one that is gone on with, and whether it was started with other settings."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, TypeVar

from ragkit.processes import is_first, shared_run, world_size
from ragkit.run_state import read_record
from ragkit.runs import Run, RunError
from ragkit.settings import Config, ConfigError, flat, load_config
from ragkit.units import counted

C = TypeVar("C", bound=Config)

# What does not change what is trained.
ASIDE = {"name", "output_dir", "resume", "train.num_threads", "train.report_to"}
ASIDE |= {f"train.{key}" for key in ("logging_steps", "log_interval", "save_steps", "save_total_limit")}
LENGTH = {"train.max_steps", "train.num_epochs", "train.num_epoch"}
PROCESSES = "process", "processes"


class OtherSettingsWarning(UserWarning):
    """A run goes on with other settings than it was started with."""


def open_run(config: Any, run: Run | None, resume: bool, again: bool) -> Run:
    """The run of a training, the same on every process.

    Args:
        config: The training's settings; `output_dir` and `name` say where a new run goes.
        run: The trainer's run, if it has one.
        resume: Whether it is to be gone on with; without `run` it is the one called `config.name`.
        again: Whether a run that has events already is left as it is, and a new one is made.

    Raises:
        RunError: `resume` without a run or a name, with one of another kind of training or one that is being trained;
            or a new run's name is taken.

    Warns:
        OtherSettingsWarning: The run was started with other settings, or in another number of processes: its curve
            will be of both.
    """
    if not resume:
        if run is None or (again and run.events()):
            return shared_run(lambda: Run.create(config, config.output_dir, config.name))
        return run
    if run is None:
        if config.name is None:
            raise RunError("which run is to be resumed? give the trainer run=Run.open(...), or set name")
        run = Run.open(Path(config.output_dir) / config.name)
    if is_first():  # the others might see its hold
        run.begin_resume()
    started = started_with(run, type(config), f"cannot be gone on with as a run of {type(config).__name__}")
    for message in (other_settings(run, started, config), other_processes(run, started, config)):
        if message:
            warnings.warn(message, OtherSettingsWarning, stacklevel=4)
    return run


def started_with(run: Run, cls: type[C], otherwise: str) -> C:
    """The settings that a run was started with.

    Args:
        run: The run.
        cls: Their class.
        otherwise: What is said of a run whose settings are those of another class.

    Raises:
        RunError: They are.
    """
    try:
        return load_config(cls, run.config_path)
    except ConfigError as error:
        raise RunError(f"{run.dir} {otherwise}: {error}") from error


def other_settings(run: Run, started: Config, config: Config) -> str:
    """What a training's settings change in those that its run was started with, in words; empty if nothing.

    Left out: folders, logging, checkpoints and, where the learning rate does not depend on it, the length.
    """
    then, now = flat(started.model_dump()), flat(config.model_dump())
    aside = ASIDE | (LENGTH if now.get("train.schedule") == "constant" else set())
    changed = [key for key in now if key not in aside and then.get(key) != now[key]]
    if not changed:
        return ""
    shown = "; ".join(f"{key}: {then.get(key)!r}, now {now[key]!r}" for key in changed[:3])
    more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"{run.dir} was started with other settings and goes on with these: {shown}{more}"


def other_processes(run: Run, started: Any, config: Any) -> str:
    """What it changes that a run is gone on with in another number of processes; empty if nothing."""
    then, now = read_record(run.dir).get("processes"), world_size()
    if then is None or then == now:
        return ""
    rows_then, rows_now = then * _rows_of_a_process(started), now * _rows_of_a_process(config)
    if rows_then == rows_now:
        return ""
    how = f"torchrun --nproc_per_node={then}" if then > 1 else "one process, without torchrun"
    return (
        f"{run.dir} was trained in {counted(then, *PROCESSES)} and goes on in {counted(now, *PROCESSES)}: a step has "
        f"{rows_now} rows from here on, not {rows_then}, so the number of steps is another, and rows are trained on "
        f"twice or left out. To go on as it began: {how}"
    )


def _rows_of_a_process(config: Any) -> int:
    """The rows that each process has in one step."""
    return int(config.train.batch_size * config.train.gradient_accumulation_steps)
