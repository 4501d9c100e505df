"""JupyterLab in a real browser: opens notebooks, runs cells, presses buttons, takes pictures.

Used by the browser test and by `python -m ragkit.dev screenshots`. It needs Chromium on the machine and the library
playwright (`pip install "ragkit[browser]"`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from ragkit.optional import require

THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START = 120  # seconds that JupyterLab and a notebook's kernel may take to start, on a busy machine
VIEW = {"width": 1320, "height": 3200}  # pixels; tall, because what a box scrolls away is in no picture of it
# No windowing: JupyterLab would take cells far from the view out of the page, and their widgets with them.
SETTINGS: dict[str, dict[str, Any]] = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
# Cells that are run before the kernel is connected are emptied, and not run.
LOADED = """() => {
    const panel = jupyterapp.shell.currentWidget;
    const kernel = panel?.sessionContext?.session?.kernel;
    if (!panel?.sessionContext?.isReady || kernel?.status !== "idle" || kernel.connectionStatus !== "connected") {
        return false;
    }
    return panel.context.isReady && panel.content.widgets.length === panel.context.model.cells.length;
}"""
# Not awaited: the cells queue up, as after a person's key presses.
RUN = """place => {
    window.ragkitRuns = (window.ragkitRuns ?? 0) + 1;
    jupyterapp.shell.currentWidget.content.activeCellIndex = place;
    jupyterapp.commands.execute("notebook:run-cell").finally(() => { window.ragkitRuns -= 1; });
}"""
FOCUSED = "() => { const e = document.activeElement; return (e.labels?.[0] ?? e).innerText?.trim() ?? ''; }"


class LabError(RuntimeError):
    """There is no browser, JupyterLab does not start, or a notebook does not do what was asked."""


def chromium() -> str | None:
    """Path of the Chromium (or Chrome) of this machine; None if there is none."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


class JupyterLab:
    """JupyterLab with a browser in front of it, both ended with the `with` block.

    Args:
        folder: Where its notebooks are; their kernels run there.
        theme: "light" or "dark".

    Raises:
        LabError: On entering: there is no Chromium, or JupyterLab does not start.
        ImportError: playwright is not installed.

    Example:
        >>> with JupyterLab("notebooks") as lab:  # doctest: +SKIP
        ...     notebook = lab.open("00_quickstart.ipynb")
        ...     notebook.run("PRESET =")
    """

    def __init__(self, folder: str | Path, theme: str = "light") -> None:
        if theme not in THEMES:
            raise LabError(f'theme: found "{theme}", expected one of {", ".join(THEMES)}')
        self.folder, self.theme = Path(folder), theme
        self._stack = ExitStack()

    def __enter__(self) -> JupyterLab:
        with ExitStack() as stack:  # what was begun is ended, should a later step fail
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
            self.url = self._serve(home, stack)
            playwright = stack.enter_context(require("playwright.sync_api", "browser").sync_playwright())
            path = chromium()
            if path is None:
                raise LabError(f"found no browser, looked for {', '.join(BROWSERS)}; install Chromium")
            self._browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            stack.callback(self._browser.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _serve(self, home: Path, stack: ExitStack) -> str:
        """Starts the server, and waits until it answers; its address."""
        for name, values in {**SETTINGS, "apputils-extension/themes": {"theme": THEMES[self.theme]}}.items():
            file = home / "settings/@jupyterlab" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values), encoding="utf-8")
        own = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
        own |= {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime"}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = ["--no-browser", "--allow-root", "--expose-app-in-browser", "--ip=127.0.0.1", f"--port={port}"]
        options += ["--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password="]
        log = stack.enter_context((home / "log.txt").open("w", encoding="utf-8"))
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=self.folder,
            env={**os.environ, **{name: str(home / folder) for name, folder in own.items()}},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        stack.callback(_end, server)
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START
        while True:
            try:
                urllib.request.urlopen(f"{url}/api", timeout=2).close()
                return url
            except (urllib.error.URLError, OSError):
                if server.poll() is not None or time.monotonic() > deadline:
                    text = (home / "log.txt").read_text(encoding="utf-8", errors="replace")[-2000:]
                    raise LabError(f"JupyterLab did not start; its log ends:\n{text}") from None
                time.sleep(0.2)

    def open(self, name: str) -> Notebook:
        """Opens a notebook of the folder, and waits for its kernel."""
        page = self._browser.new_page(viewport=VIEW)
        page.set_default_timeout(START * 1000)
        page.goto(f"{self.url}/lab/tree/{name}?reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")
        while page.locator(".jp-Dialog").count():
            page.keyboard.press("Escape")
            page.wait_for_timeout(100)
        page.wait_for_function(LOADED)
        page.evaluate("() => jupyterapp.shell.collapseLeft()")
        return Notebook(page)


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ends the server, which ends its kernels."""
    server.terminate()
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


class Notebook:
    """A notebook that is open in the browser.

    Attributes:
        page: Playwright's page, for what has no method here.
    """

    def __init__(self, page: Any) -> None:
        self.page = page

    def sources(self) -> list[str]:
        """The text of all cells."""
        return self.page.evaluate(
            "() => jupyterapp.shell.currentWidget.content.widgets.map(w => w.model.sharedModel.getSource())"
        )

    def index(self, content: str) -> int:
        """Place of the first cell that holds a text.

        Raises:
            LabError: No cell holds it.
        """
        for place, source in enumerate(self.sources()):
            if content in source:
                return place
        raise LabError(f"no cell of the notebook holds {content!r}")

    def cell(self, content: str) -> Any:
        """The first cell that holds a text, as a Playwright locator, scrolled into view."""
        found = self.page.locator(".jp-Notebook .jp-Cell").nth(self.index(content))
        found.scroll_into_view_if_needed()
        return found

    def output(self, content: str) -> Any:
        """What a cell shows, as a Playwright locator."""
        return self.cell(content).locator(".jp-Cell-outputArea")

    def run(self, first: str, last: str | None = None, timeout: float = 120) -> None:
        """Runs the cells from one to another, both found by a text that they hold, and waits for them.

        Args:
            first: Text of the first cell.
            last: Text of the last cell; None: the first one only.
            timeout: Seconds that they may take.

        Raises:
            LabError: A cell failed, or it takes longer.
        """
        begin, end = self.index(first), self.index(last if last is not None else first)
        if end < begin:
            raise LabError(f"the cell with {last!r} comes before the cell with {first!r}")
        for place in range(begin, end + 1):
            self.page.evaluate(RUN, place)
        self.wait(timeout)

    def run_above(self, content: str, timeout: float = 120) -> None:
        """Runs all cells above the one that holds a text."""
        above = self.sources()[: self.index(content)]
        if above:
            self.run(above[0], above[-1], timeout)

    def run_all(self, timeout: float = 600) -> None:
        """Runs all cells."""
        self.run(self.sources()[0], self.sources()[-1], timeout)

    def wait(self, timeout: float = 120) -> None:
        """Waits until no cell runs or waits for its turn.

        Raises:
            LabError: A cell failed, or it takes longer.
        """
        try:
            self.page.wait_for_function("() => !window.ragkitRuns", timeout=timeout * 1000)
        except require("playwright.sync_api", "browser").TimeoutError as error:
            raise LabError(f"a cell still runs after {timeout:g} s") from error
        errors = self.page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]')
        if errors.count():
            raise LabError(f"a cell failed: {errors.first.inner_text()[-2000:]}")

    def button(self, name: str, within: Any = None) -> Any:
        """A button by its text; its icon, a letter of a font, is no part of that."""
        return (within or self.page).locator("button", has_text=re.compile(rf"^\s*{re.escape(name)}\s*$"))

    def press(self, name: str, within: Any = None) -> None:
        """Clicks a button by its text, as soon as it is on."""
        self.button(name, within).click()

    def fill(self, label: str, value: str, within: Any = None) -> Any:
        """Writes a value into the input with a label, of those in sight, and leaves it; gives the input."""
        found = (within or self.page).get_by_label(label, exact=True).locator("visible=true")
        found.fill(value)
        found.press("Tab")
        return found

    def use_theme(self, theme: str) -> None:
        """Changes the colours of the page: "light" or "dark"."""
        change = "name => jupyterapp.commands.execute('apputils:change-theme', {theme: name})"
        self.page.evaluate(change, THEMES[theme])
        light = "true" if theme == "light" else "false"
        self.page.wait_for_function(f"() => document.body.dataset.jpThemeLight === '{light}'")

    def focused(self) -> str:
        """Label or text of what has the keyboard's focus."""
        return self.page.evaluate(FOCUSED)

    def shot(self, what: Any, path: str | Path) -> Path:
        """Takes a picture of a cell or another element, as PNG, with as few colours as it needs."""
        what.scroll_into_view_if_needed()
        self.page.mouse.move(0, 0)  # no tooltip
        self.page.wait_for_timeout(300)
        what.screenshot(path=str(path), animations="disabled")
        image = require("PIL.Image", "notebooks").open(path).convert("RGB").quantize(128)
        image.save(path, optimize=True)
        return Path(path)
