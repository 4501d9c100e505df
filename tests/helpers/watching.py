"""What tests watch trainings with."""

from __future__ import annotations

import time

from ragkit.runs import Run


def until(condition, seconds=300, what="such thing"):
    """Waits until the condition gives something true, and returns it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"it never came so far: no {what} in {seconds} s"
        time.sleep(0.05)
    return found


def losses(of):
    """The losses of a training, in order: of its result, its `Run`, its panel or the folder of the run."""
    if hasattr(of, "history"):
        events = of.history
    else:
        run = of if isinstance(of, Run) else Run.open(getattr(of, "run_dir", of))
        events = run.events()
    return [event["loss"] for event in events if event.get("loss") is not None]
