"""The README's pictures of form, panel and graph view, taken in a browser."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ragkit.dev.execute import KERNEL, NOTEBOOKS
from ragkit.dev.lab import JupyterLab, LabError, Notebook
from ragkit.optional import require

IMAGES = NOTEBOOKS / "images"
MOST = 150_000  # bytes of a picture
FORM = """import os

os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
from ragkit import LSRConfig
from ragkit.widgets import ConfigForm, RunPanel

form = ConfigForm(LSRConfig, preset="cpu-minute")
form"""
PANEL = """panel = RunPanel(form)
panel"""
TRAIN = "panel.run()"
GRAPH_MODEL = """from ragkit import quickstart_graph as qg
from ragkit.config import QuickstartConfig
from ragkit.runs import Run

settings = QuickstartConfig(gfm={"train": {"num_threads": 1}})
_, retriever = qg.tune_graph(qg.load_graph_step(settings), settings, Run.create(settings, "runs"))"""
GRAPH = """from ragkit.widgets import GraphView

GraphView(retriever, "What is the currency of the country where Nicolaus Copernicus was born?")"""


def scratch(path: Path, sources: Sequence[str]) -> Path:
    """Writes a notebook that has the given code cells and no outputs."""
    nbformat = require("nbformat", extra="notebooks")
    notebook = nbformat.v4.new_notebook(metadata=KERNEL)  # without one, JupyterLab asks which
    for number, source in enumerate(sources):
        notebook.cells.append(nbformat.v4.new_code_cell(source, id=f"cell-{number:02d}"))
    nbformat.write(notebook, path)
    return path


def screenshots(out: Path = IMAGES, timeout: float = 400) -> Iterator[Path]:
    """Trains a minute or two in a notebook, and takes form.png, run_panel.png and graph_view.png.

    Args:
        out: Folder of the pictures.
        timeout: Seconds that one training may take.

    Raises:
        LabError: There is no browser, a cell failed, or a picture is too large for the README.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch(Path(folder) / "pictures.ipynb", (FORM, PANEL, TRAIN, GRAPH_MODEL, GRAPH))
        with JupyterLab(folder) as lab:
            notebook = lab.open("pictures.ipynb")
            notebook.run(FORM)
            yield _shot(notebook, FORM, out / "form.png")
            notebook.run(PANEL, TRAIN, timeout)
            notebook.output(PANEL).get_by_text("Finished: ").first.wait_for()
            yield _shot(notebook, PANEL, out / "run_panel.png")
            notebook.run(GRAPH_MODEL, GRAPH, timeout)
            notebook.output(GRAPH).locator("svg[role=img]").first.wait_for()
            yield _shot(notebook, GRAPH, out / "graph_view.png")


def _shot(notebook: Notebook, content: str, path: Path) -> Path:
    notebook.shot(notebook.output(content).locator(".jp-OutputArea-output").first, path)
    if path.stat().st_size > MOST:
        raise LabError(f"{path}: found {path.stat().st_size} bytes, expected at most {MOST}")
    return path
