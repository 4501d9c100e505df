"""What the commands show: their own lines and nothing else, with Ctrl-C as a request to stop."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ragkit.notes import Listener, listen
from ragkit.run_state import one_line
from ragkit.runs import Run

Out = Callable[[str], None]


def silence_libraries() -> None:
    """No progress bars and no chatter from other libraries; call it before they are imported.

    Their errors still raise, and warnings of ragkit's own (a gradient that is exactly 0) still show.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it when it is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("transformers", "sentence_transformers", "datasets", "peft", "huggingface_hub", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
    # Raised from PyTorch's own code on a machine without a GPU, about a setting that is not ours.
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


@contextmanager
def step_lines(out: Out, lines: int = 10) -> Iterator[None]:
    """While a training runs, prints about `lines` of its steps."""
    with listen(_StepHandler(out, lines)):
        yield


class _StepHandler(Listener):
    """Turns the engine's log record of a step into a line; other messages of ragkit are shown as they are."""

    def __init__(self, out: Out, lines: int):
        super().__init__()
        self.out, self.lines = out, max(1, lines)
        self.begin = time.monotonic()
        self.next_step = 0

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno > logging.INFO:
            self.out(f"  note: {record.getMessage()}")
        if str(record.msg).startswith("estimate: "):
            self.out(f"  {record.getMessage()}")
            return
        if not isinstance(record.args, tuple) or len(record.args) != 3 or not record.msg.startswith("step "):
            return
        step, total, shown = int(str(record.args[0])), int(str(record.args[1])), record.args[2]
        evaluated = "eval_" in str(shown)  # those are few, and what one waits for
        if step < self.next_step and step != total and not evaluated:
            return
        self.next_step = self.next_step if evaluated else step + max(1, total // self.lines)
        words = str(shown).split()  # "loss 0.3 grad_norm 1.2 ...": name, value, name, value
        values = {name: value for name, value in zip(words[::2], words[1::2], strict=False) if name != "epoch"}
        text = "  ".join(f"{name} {value}" for name, value in values.items())
        self.out(f"  step {step}/{total}  {text}  ({time.monotonic() - self.begin:.0f} s)")


@contextmanager
def stop_on_interrupt(run: Run, out: Out) -> Iterator[list[bool]]:
    """The first Ctrl-C asks the training to save a checkpoint and end; the second one ends it at once.

    Yields:
        A list that holds True once Ctrl-C was pressed.
    """
    pressed: list[bool] = []
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield pressed
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)
        run.request_stop()
        out("  stopping after this step, with a checkpoint (Ctrl-C again: at once)")

    signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def explain(error: BaseException) -> str | None:
    """The line for the user if an error is about what they gave; None for a fault of the program.

    An error of ours has its class in ragkit, or was raised by ragkit's own code on purpose (the last frame is ours);
    a missing library or file also concerns the user.
    """
    if type(error).__module__.split(".")[0] in ("ragkit", "ragkit_kernels"):
        return str(error)
    if isinstance(error, ImportError | OSError):
        return one_line(error)
    frames = traceback.walk_tb(error.__traceback__)
    last = None
    for frame, _ in frames:
        last = frame.f_globals.get("__name__", "")
    if last and last.split(".")[0] == "ragkit" and isinstance(error, ValueError | TypeError) and error.args:
        return str(error)
    return None
