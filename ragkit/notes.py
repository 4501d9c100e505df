"""What a training says on the way: to whoever listens in its thread, or as a printed line where nobody does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("ragkit")
_lock = threading.Lock()
_before: list[tuple[int, bool]] = []  # level and propagation of the logger before anybody listened
_listening = 0


class Listener(logging.Handler):
    """Takes ragkit's log records of the thread that it was made for; other trainings have listeners of their own."""

    def __init__(self, thread: int | None = None) -> None:
        super().__init__()
        self.thread = threading.get_ident() if thread is None else thread

    def filter(self, record: logging.LogRecord) -> bool:  # type: ignore[override]
        """Whether the record is of our thread."""
        return record.thread == self.thread and bool(super().filter(record))


def note(message: str) -> None:
    """Says something to the person at the screen.

    A command and a run panel listen while they train, and show the message among their own lines: a worker thread of a
    notebook must not print, its text would land under whatever cell runs just then. Else the message is printed.
    """
    here = threading.get_ident()
    if any(isinstance(handler, Listener) and handler.thread == here for handler in logger.handlers):
        logger.warning("%s", message)
    else:
        print(message)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Within the block a listener hears ragkit's records from level INFO on, and nobody else prints them."""
    global _listening
    with _lock:
        if not _listening:
            _before[:] = [(logger.level, logger.propagate)]
            logger.setLevel(logging.INFO)
            logger.propagate = False
        _listening += 1
        logger.addHandler(listener)
    try:
        yield
    finally:
        with _lock:
            logger.removeHandler(listener)
            _listening -= 1
            if not _listening:
                level, logger.propagate = _before[0]
                logger.setLevel(level)
