"""Runs notebooks and stores them in one form, so that a difference in git is a difference in fact."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Sequence
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
    """

    path: Path
    seconds: float
    cells: int
    size: int


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
            if output.output_type == "execute_result":
                output.execution_count = count
            if not output.data:
                continue
        merged.append(output)
    return merged


def execute(path: Path, timeout: int = 900) -> Executed:
    """Runs a notebook in a temporary folder and writes it back.

    Raises:
        NotebookError: A cell failed; the file is left as it was.
    """
    nbformat = require("nbformat", extra="notebooks")
    nbclient = require("nbclient", extra="notebooks")
    notebook = nbformat.read(path, as_version=4)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            store_widget_state=False,
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        try:
            client.execute()
        except nbclient.exceptions.CellExecutionError as error:
            raise NotebookError(f"{path.name}: {error}") from error
        except nbclient.exceptions.CellTimeoutError as error:
            raise NotebookError(f"{path.name}: a cell took more than {timeout} s") from error
    seconds = time.monotonic() - begin
    text = nbformat.writes(normalise(notebook, path.stem)) + "\n"
    atomic_write_text(path, text)
    return Executed(path, seconds, len(notebook.cells), len(text.encode()))
