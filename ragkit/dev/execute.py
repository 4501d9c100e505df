"""Runs notebooks and stores them in one form, so that a difference in git is a difference in fact."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragkit.files import atomic_write_text
from ragkit.optional import require

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"  # means nothing without the kernel that it was made in
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
KEPT = ("alt", "width", "height")  # of what an output says about its picture
# As in CI: no network, and the chatter of no library depends on it.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)")


class NotebookError(RuntimeError):
    """A notebook that is not there, or that does not run to its end."""


@dataclass(frozen=True)
class Executed:
    """One notebook that was run.

    Attributes:
        path: The file.
        seconds: How long it took, with the start of its kernel.
        cells: Number of cells.
        size: Bytes of the file.
        memory: Most bytes that its kernel and the processes started from it held at once (resident, looked at every
            0.2 s).
    """

    path: Path
    seconds: float
    cells: int
    size: int
    memory: int


def find(names: Sequence[str]) -> list[Path]:
    """Notebooks by number ("03"), by name or by path; all of them where none is named.

    Raises:
        NotebookError: There is no such notebook.
    """
    every = sorted(NOTEBOOKS.glob("*.ipynb"))
    if not names:
        return every
    found = []
    for name in names:
        here = [path for path in every if path.stem == name or path.stem.startswith(f"{name}_")]
        if Path(name).suffix == ".ipynb":
            here = [Path(name)]
        if len(here) != 1 or not here[0].is_file():
            raise NotebookError(f'there is no notebook "{name}"; there are {", ".join(p.stem[:2] for p in every)}')
        found.append(here[0])
    return found


def repository() -> str:
    """OWNER/NAME on GitHub, from `[project.urls]` in pyproject.toml: the one place where it stands.

    Raises:
        NotebookError: pyproject.toml does not name a repository on GitHub.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'(?m)^Repository = "https://github\.com/([\w.-]+/[\w.-]+)"$', text)
    if match is None:
        raise NotebookError(f"{ROOT / 'pyproject.toml'}: [project.urls] names no Repository on github.com")
    return match[1]


def badge(name: str) -> str:
    """The line that opens a notebook in Colab."""
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return (
        f"[![Open in Colab]({image})](https://colab.research.google.com/github/{repository()}"
        f"/blob/main/notebooks/{name}.ipynb)"
    )


def with_badge(source: str, name: str) -> str:
    """The header cell with the badge under its title."""
    if BADGE.search(source):
        return BADGE.sub(lambda _: badge(name), source)
    title, _, rest = source.partition("\n")
    return f"{title}\n\n{badge(name)}\n{rest}"


def normalise(notebook: Any, name: str) -> Any:
    """One form for all: no widget state, no times, stable cell ids, streams in one piece.

    Args:
        notebook: An nbformat notebook; changed in place.
        name: Its file name without the ending.
    """
    notebook.metadata = dict(KERNEL)
    count = 0
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        cell.source = cell.source.strip("\n")
        if number == 0 and cell.cell_type == "markdown":
            cell.source = with_badge(cell.source, name)
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            cell.outputs = _outputs(cell.outputs, count)
    return notebook


def _outputs(outputs: list[Any], count: int) -> list[Any]:
    merged: list[Any] = []
    for output in outputs:
        before = merged[-1] if merged else None
        if output.output_type == "stream" and before is not None and before.get("name") == output.name:
            before.text += output.text
            continue
        if output.output_type in ("display_data", "execute_result"):
            output.data.pop(WIDGET_VIEW, None)
            said = {kind: {k: v for k, v in about.items() if k in KEPT} for kind, about in _dicts(output.metadata)}
            output.metadata = {kind: about for kind, about in said.items() if about and kind in output.data}
            if output.output_type == "execute_result":
                output.execution_count = count
            if not output.data:
                continue
        merged.append(output)
    return merged


def _dicts(metadata: Any) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in metadata.items() if isinstance(value, dict)]


# ---- running ----


def execute(path: Path, timeout: int = 900) -> Executed:
    """Runs a notebook with this Python, in a temporary folder and without a network, and writes it back.

    Args:
        path: The notebook.
        timeout: Seconds that one cell may take.

    Raises:
        NotebookError: A cell failed (the message holds it and its error); the file is left as it was.
    """
    nbformat = require("nbformat", extra="notebooks")
    nbclient = require("nbclient", extra="notebooks")
    notebook = nbformat.read(path, as_version=4)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        client = nbclient.NotebookClient(
            notebook,
            km=_kernel_manager(),
            timeout=timeout,
            store_widget_state=False,
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        try:
            with _peak_memory(client) as peak:
                client.execute(env={**os.environ, **OFFLINE}, cleanup_kc=True)
        except nbclient.exceptions.CellExecutionError as error:
            raise NotebookError(f"{path.name}: {error}") from error
        except nbclient.exceptions.CellTimeoutError as error:
            raise NotebookError(f"{path.name}: a cell took more than {timeout} s:\n{error}") from error
        except nbclient.exceptions.DeadKernelError as error:
            raise NotebookError(f"{path.name}: its kernel died, perhaps for want of memory: {error}") from error
    seconds = time.monotonic() - begin
    text = nbformat.writes(normalise(notebook, path.stem)) + "\n"
    atomic_write_text(path, text)
    return Executed(path, seconds, len(notebook.cells), len(text.encode()), max(peak))


def _kernel_manager() -> Any:
    """A manager of kernels of this Python, whatever kernel the user has registered as "python3"."""
    spec = require("ipykernel.kernelspec", extra="notebooks")
    jupyter = require("jupyter_client", extra="notebooks")

    class ThisPython(jupyter.kernelspec.KernelSpecManager):  # type: ignore[name-defined]
        def get_kernel_spec(self, kernel_name: str) -> Any:
            return jupyter.kernelspec.KernelSpec(resource_dir=spec.RESOURCES, **spec.get_kernel_dict())

    return jupyter.AsyncKernelManager(kernel_spec_manager=ThisPython())


@contextmanager
def _peak_memory(client: Any) -> Iterator[list[int]]:
    """A list to which the bytes that a notebook's processes hold are added, while the block runs."""
    psutil = require("psutil", extra="notebooks")
    seen, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            pid = getattr(client.km.provisioner, "pid", None)
            try:
                kernel = psutil.Process(pid) if pid else None
                processes = [kernel, *kernel.children(recursive=True)] if kernel else []
                seen.append(sum(process.memory_info().rss for process in processes))
            except psutil.Error:
                continue  # one of them ended meanwhile

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def check(path: Path, timeout: int = 600) -> None:
    """Runs a notebook again and compares what it prints with what it stores (nbval, strict); writes nothing.

    Args:
        path: The notebook.
        timeout: Seconds that one cell may take; all of them may take three times as long.

    Raises:
        NotebookError: An output differs, or a cell fails.
    """
    require("nbval", extra="test")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        copy = folder / path.name
        copy.write_bytes(path.read_bytes())
        (folder / "none.ini").write_text("[pytest]\n", encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", name]
        command += [
            "-c",
            str(folder / "none.ini"),
            "--nbval",
            "--nbval-current-env",
            f"--nbval-cell-timeout={timeout}",
        ]
        command += [f"--nbval-sanitize-with={ROOT / 'tests' / 'nbval_sanitize.cfg'}", str(copy)]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=3 * timeout, env={**os.environ, **OFFLINE}
            )
        except subprocess.TimeoutExpired as error:
            raise NotebookError(f"{path.name} took more than {3 * timeout} s") from error
        if done.returncode:
            raise NotebookError(f"{path.name}:\n{done.stdout[-6000:]}{done.stderr[-2000:]}")
