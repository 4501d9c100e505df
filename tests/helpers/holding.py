"""Holds a training of another process at one place, so that no test depends on how quick the machine is."""

from __future__ import annotations

import os
from pathlib import Path

from watching import until

from ragkit.files import atomic_write_text

FOLDER = Path(__file__).parent / "held"


class Hold:
    """Holds the Python processes that are started with `environment` at a place of their training.

    Args:
        folder: An empty folder of its own.
    """

    def __init__(self, folder):
        self._file, self._arrived = folder / "hold", folder / "arrived"
        places = [str(FOLDER), os.environ.get("PYTHONPATH", "")]
        self.environment = {"HOLD": str(self._file), "PYTHONPATH": os.pathsep.join(filter(None, places))}

    def at(self, place):
        """From now on: at "create", before the run folder is made, or at a step, whose event is written then."""
        self._arrived.unlink(missing_ok=True)
        atomic_write_text(self._file, str(place))

    def arrived(self):
        return self._arrived.exists()

    def wait(self, seconds=300):
        """Waits until a process is held."""
        until(self.arrived, seconds, "process that is held")

    def let_go(self):
        self._file.unlink(missing_ok=True)
