"""The notebooks: executed from top to bottom as they are stored, and what they print again is what is stored."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from ragkit.dev.execute import badge, check, repository

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_IGNORED, MOST_IGNORED_OF_ALL = 0.2, 0.1  # share of the code cells whose output may differ, in one and in all
KNOBS = "the knobs"
HEADER = ("**Goal.**", "**Time**", "**Memory**", "**Network**", "**Data**", "**Seed**")
PATHS = re.compile(r"(?<![\w.])/(home|root|work|tmp|Users)/")


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def ignored(cells):
    return [cell for cell in cells if "nbval-ignore-output" in cell.metadata.get("tags", [])]


def test_all_notebooks_are_there():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(11)]


def test_few_outputs_are_left_out_of_the_comparison():
    cells = [cell for path in NOTEBOOKS for cell in code_cells(read(path))]
    assert len(ignored(cells)) <= MOST_IGNORED_OF_ALL * len(cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_notebook_is_clean(path):
    notebook = read(path)
    cells = code_cells(notebook)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)), "python -m ragkit.dev execute"
    assert "widgets" not in notebook.metadata and notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size <= 200_000
    text = path.read_text(encoding="utf-8")
    assert not PATHS.search(text), "a path of a machine"
    assert "widget-view" not in text, "means nothing without its kernel: python -m ragkit.dev execute"
    assert not [c.source for c in cells if c.source.rstrip().endswith(";")]
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    assert len(ignored(cells)) <= MOST_IGNORED * len(cells)
    assert set().union(*(cell.metadata for cell in notebook.cells)) <= {"tags"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_built_like_the_others(path):
    """Header, installation on Colab, knobs; summary, exercises and what comes next."""
    notebook = read(path)
    header, *_, last = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert notebook.cells[0].source == header and header.startswith(f"# {path.stem[:2]} · ")
    assert [word for word in HEADER if word not in header] == []
    assert "T4" in header and badge(path.stem) in header
    install, *others = [cell.source for cell in code_cells(notebook)]
    assert 'if "google.colab" in sys.modules' in install and "%pip install" in install and repository() in install
    assert not [source for source in others if "pip install" in source]
    assert sum(KNOBS in source for source in others) == 1
    assert last.startswith("## Summary") and "**Exercises.**" in last and re.search(r"\nNext: .*\]\(", last)
    assert 18 <= len(notebook.cells) <= 40


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_lead_somewhere(path):
    for cell in read(path).cells:
        for target in re.findall(r"\]\(([^)\s]+)\)", cell.source if cell.cell_type == "markdown" else ""):
            if not target.startswith(("http", "data:", "#")):
                assert (path.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_pictures_have_words(path):
    """Read out where the picture is not seen: as the output's `alt`, or (SVG) inside it."""
    for cell in code_cells(read(path)):
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                assert output.metadata.get("image/png", {}).get("alt"), cell.source
            for kind in ("image/svg+xml", "text/html"):
                assert kind not in data or "<svg" not in data[kind] or re.search("<title|aria-label", data[kind])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_form_has_its_code_twin(path):
    cells = [cell.source for cell in code_cells(read(path))]
    for number, source in enumerate(cells):
        if "ConfigForm(" in source:
            twin = cells[number + 1]
            assert ".code()" in twin or "Config(" in twin, "the next cell says the same in code"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_gives_what_it_stores(path):
    """nbval runs it in a kernel of this environment, in a folder of its own, and compares the outputs cell by cell."""
    check(path)
