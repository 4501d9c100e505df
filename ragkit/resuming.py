"""The settings of a run that is gone on with: those it was started with, and no others."""

from __future__ import annotations

import os
from typing import Any

from ragkit.inputs import CommandError
from ragkit.processes import is_first
from ragkit.run_opening import started_with
from ragkit.run_state import JOB
from ragkit.runs import Run
from ragkit.settings import Config, flat


def begin_with(path: str) -> Run:
    """Opens the run that a command goes on with, before the command loads anything: from now on it can be stopped.

    Raises:
        RunError: There is no such run, or it is being trained.
    """
    run = Run.open(path)
    if is_first():
        # A job has forgotten the old request itself; what is there now was asked while this process was starting.
        run.begin_resume(forget=JOB not in os.environ)
    return run


def settings_of_run(run: Run, given: Config, command: str) -> Any:
    """The settings that a resumed run was started with.

    Args:
        run: The run.
        given: What was asked for now; may repeat the run's settings, but not change them.
        command: The command's name, for messages.

    Raises:
        RunError: The run is one of another command.
        CommandError: `given` asks for something else; a resumed run must go on as it began.
    """
    config = started_with(run, type(given), f"is not a run of the command {command}")
    mine, theirs = flat(given.explicit()), flat(config.model_dump())
    # A group that was not given counts its own defaults as explicit.
    groups = {name for name in type(given).model_fields if isinstance(getattr(given, name), Config)}
    default = flat({name: getattr(type(given)(), name).explicit() for name in groups - given.model_fields_set})
    asked = [key for key in mine if key != "resume" and (key not in default or mine[key] != default[key])]
    other = [key for key in asked if mine[key] != theirs.get(key)]
    if other:
        raise CommandError(
            f"resume: {run.dir} was started with other values of {', '.join(other)} "
            f"({other[0]}={theirs.get(other[0])}, now {mine[other[0]]}); leave them out, or start a new run"
        )
    return config
