"""An estimate that is made in the background, for the run panel."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ragkit.config import Config
from ragkit.console import explain
from ragkit.estimate import Estimate, estimate
from ragkit.files import atomic_write_text
from ragkit.run_state import one_line
from ragkit.widgets.base import TEXT, error_html
from ragkit.widgets.run_view import quiet_html, table_html
from ragkit.widgets.thread_run import quiet

MAKING = "Estimating: a few real steps are made in a temporary folder; this takes as long as loading the models."


class Estimating:
    """Makes one estimate at a time.

    Args:
        show: Takes the HTML that is to be shown.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._cancelled = False
        self._made = threading.Event()
        self._made.set()

    @property
    def busy(self) -> bool:
        """Whether one is being made."""
        return not self._made.is_set()

    def of_config(self, command: str, config: Config) -> None:
        """Estimates a command in a process of its own."""
        self._start(lambda: self._ask(command, config))

    def of_trainer(self, trainer: Any) -> None:
        """Estimates a trainer of this kernel; its weights are afterwards as they were."""
        self._start(lambda: estimate(trainer))

    def cancel(self) -> None:
        """Ends it, because the training itself begins; one of a trainer is waited for, as it works on its model."""
        if not self.busy:
            return
        self._cancelled = True
        while not self._made.wait(0.05):
            process = self._process
            if process is not None:
                process.kill()
        self._show("")

    def wait(self) -> None:
        """Waits until it is made and shown."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _start(self, make: Callable[[], Estimate]) -> None:
        if self.busy:
            return
        self._cancelled = False
        self._made.clear()
        self._thread = threading.Thread(target=self._work, args=(make,), name="ragkit estimate", daemon=True)
        self._show(quiet_html(MAKING))
        self._thread.start()

    def _work(self, make: Callable[[], Estimate]) -> None:
        html = ""
        try:
            with quiet(lambda line: None):
                found = make()
            html = f'<div style="color: {TEXT}; line-height: 1.4">{table_html(found)}</div>'
        except BaseException as error:
            ours = explain(error) if isinstance(error, Exception) else None
            html = error_html(f"there is no estimate: {ours or one_line(error)}")
        finally:
            self._process = None
            # Before it is shown: who cancels holds the panel, which the showing waits for.
            self._made.set()
            if not self._cancelled:
                with suppress(Exception):  # the front end may be gone
                    self._show(html)

    def _ask(self, command: str, config: Config) -> Estimate:
        with tempfile.TemporaryDirectory() as folder:
            path = atomic_write_text(Path(folder) / "settings.yaml", config.to_yaml())
            arguments = [sys.executable, "-m", "ragkit.estimate", command, str(path), "--json"]
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            out, err = self._process.communicate()
        if self._process.returncode != 0:
            lines = [line for line in err.splitlines() if line.strip()]
            raise RuntimeError(lines[-1].removeprefix("ragkit: ") if lines else "the process that makes it was ended")
        return Estimate.from_dict(json.loads(out.splitlines()[-1]))
