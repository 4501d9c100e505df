"""A command under torchrun: who speaks, and how all processes come to work in one run folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ragkit.runs import Run, RunError


def world_size() -> int:
    """How many processes torchrun (or another launcher) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among all of them, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process speaks and writes for all of them."""
    return rank() == 0


def join(device: str) -> None:
    """Connects the processes and gives each its own GPU; nothing to do for a single process.

    Args:
        device: The setting `rag.device`; "cpu" connects through gloo, anything else through what accelerate chooses.
    """
    if world_size() == 1:
        return
    import torch
    from accelerate import PartialState

    # accelerate does this for the Trainer anyway, but the models are loaded, and the run is made, before that.
    PartialState(cpu=device == "cpu" or not torch.cuda.is_available())


def shared_run(make: Callable[[], Run]) -> Run:
    """The run that the first process makes, for all processes.

    Raises:
        RunError: The first process could not make it.
    """
    if world_size() == 1:
        return make()
    import torch.distributed

    message: list[Any] = [None, None]  # folder, what went wrong
    run = None
    if is_first():
        try:
            run = make()
            message = [str(run.dir), None]
        except (RunError, OSError) as error:
            message = [None, str(error)]
    torch.distributed.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise RunError(message[1])
    return run if run is not None else Run(message[0])


def leave() -> None:
    """Takes this process out of the group, so that the launcher sees it end cleanly."""
    if world_size() == 1:
        return
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
