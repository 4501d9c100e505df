"""The run of a training: a new folder, or one that is gone on with, and whether it was started with other settings."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ragkit.processes import shared_run
from ragkit.runs import Run, RunError
from ragkit.settings import Config, ConfigError, load_config

# What does not change what is trained.
ASIDE = {"name", "output_dir", "resume", "train.num_threads", "train.report_to"}
ASIDE |= {f"train.{key}" for key in ("logging_steps", "log_interval", "save_steps", "save_total_limit")}
LENGTH = {"train.max_steps", "train.num_epochs", "train.num_epoch"}


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
        RunError: `resume` without a run or a name, a run of another kind of training, or a new run's name is taken.

    Warns:
        OtherSettingsWarning: The run was started with other settings: its curve will be of both.
    """
    if not resume:
        if run is None or (again and run.events()):
            return shared_run(lambda: Run.create(config, config.output_dir, config.name))
        return run
    if run is None:
        if config.name is None:
            raise RunError("which run is to be resumed? give the trainer run=Run.open(...), or set name")
        run = Run.open(Path(config.output_dir) / config.name)
    changed = other_settings(run, config)
    if changed:
        shown = "; ".join(f"{key}: {old!r}, now {new!r}" for key, (old, new) in list(changed.items())[:3])
        more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
        message = f"{run.dir} was started with other settings and goes on with these: {shown}{more}"
        warnings.warn(message, OtherSettingsWarning, stacklevel=4)
    return run


def other_settings(run: Run, config: Config) -> dict[str, tuple[Any, Any]]:
    """What a training's settings change in those that its run was started with: key -> (then, now).

    Left out: folders, logging, checkpoints and, where the learning rate does not depend on it, the length.

    Raises:
        RunError: The run's settings are those of another kind of training.
    """
    try:
        started = load_config(type(config), run.config_path)
    except ConfigError as error:
        raise RunError(f"{run.dir} cannot be gone on with as a run of {type(config).__name__}: {error}") from error
    then, now = flat(started.model_dump()), flat(config.model_dump())
    aside = ASIDE | (LENGTH if now.get("train.schedule") == "constant" else set())
    return {key: (then.get(key), now[key]) for key in now if key not in aside and then.get(key) != now[key]}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list):
            value = [item.model_dump() if isinstance(item, Config) else item for item in value]
        found.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value})
    return found
