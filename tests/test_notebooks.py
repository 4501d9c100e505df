"""The notebooks: executed from top to bottom as they are stored, and what they print again is what is stored."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_IGNORED = 0.2  # share of the code cells whose output may differ (tables of trained scores)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_notebook_is_clean(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)), "execute it from top to bottom"
    assert "widgets" not in notebook.metadata and notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size <= 200_000
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/", text), "a path of a machine"
    assert not [c.source for c in cells if c.source.rstrip().endswith(";")]
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    ignored = [c for c in cells if "nbval-ignore-output" in c.metadata.get("tags", [])]
    assert len(ignored) <= MOST_IGNORED * len(cells)
    assert notebook.cells[0].source.startswith(f"# {path.stem[:2]} ")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_gives_what_it_stores(path, tmp_path):
    """nbval runs it in a kernel of this environment, in a folder of its own, and compares the outputs cell by cell."""
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    command += ["-c", str(tmp_path / "none.ini"), "--nbval", "--nbval-current-env", "--nbval-cell-timeout=900"]
    command += [f"--nbval-sanitize-with={ROOT / 'tests' / 'nbval_sanitize.cfg'}", str(copy)]
    (tmp_path / "none.ini").write_text("[pytest]\n", encoding="utf-8")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
