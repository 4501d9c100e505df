"""Python imports this at the start of the processes that a `holding.Hold` holds: their folder of modules is this one.

The file that HOLD names says where to wait: "create" (the run folder is about to be made) or the number of a step,
whose event has just been written. The process waits there until the file is gone or says something else.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from ragkit.runs import Run

HOLD = Path(os.environ["HOLD"])
LONGEST = 900.0  # seconds until it goes on without the test, which must have been killed


def place():
    try:
        return HOLD.read_text()
    except OSError:
        return ""


def wait_at(here):
    if place() != here:
        return
    HOLD.with_name("arrived").touch()
    end = time.monotonic() + LONGEST
    while place() == here and time.monotonic() < end:
        time.sleep(0.02)


create, log = Run.create.__func__, Run.log


@classmethod
def held_create(cls, *args, **kwargs):
    wait_at("create")
    return create(cls, *args, **kwargs)


def held_log(self, event):
    log(self, event)
    if event.get("loss") is not None:
        wait_at(str(event.get("step")))


Run.create, Run.log = held_create, held_log
