"""Which training command settings belong to, and which one a run folder is of."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ragkit.commands import COMMANDS, command_of
from ragkit.config import Config, ConfigError, load_config
from ragkit.runs import Run, RunError

TRAININGS = ("lsr", "ralt", "gfm-pretrain", "gfm-finetune")


def training_of(config: Config) -> str:
    """The training command whose settings these are.

    Raises:
        RunError: They are those of something else.
    """
    command = next((name for name, (kind, _) in COMMANDS.items() if type(config) is kind), None)
    if command not in TRAININGS:
        kinds = ", ".join(COMMANDS[name][0].__name__ for name in TRAININGS)
        raise RunError(f"found {type(config).__name__}, expected the settings of a training: {kinds}")
    return command


def command_of_run(run: Run, record: dict[str, Any] | None = None) -> str | None:
    """The command that a run folder is of; None if its settings are those of none."""
    if record and record.get("kind") in TRAININGS:
        return record["kind"]
    for command in TRAININGS:
        with suppress(ConfigError, OSError, RunError):
            config = load_config(COMMANDS[command][0], run.config_path)
            if set(config.model_dump()) == set(run.config()):
                return command_of(config)
    return None
