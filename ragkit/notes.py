"""What a training says on the way: a note to whoever listens, or a printed line where nobody does."""

from __future__ import annotations

import logging

logger = logging.getLogger("ragkit")


def note(message: str) -> None:
    """Says something to the person at the screen.

    A command and a run panel listen to the logger "ragkit" while they train, and show the message among their own
    lines; a worker thread of a notebook must not print, its text would land under whatever cell runs just then. Where
    nobody listens, the message is printed.
    """
    if logger.handlers:
        logger.warning("%s", message)
    else:
        print(message)
