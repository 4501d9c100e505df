"""Running notebooks: what is stored, what is left out, and what a notebook that fails leaves behind."""

from __future__ import annotations

import json
import sys

import nbformat
import pytest

from ragkit.dev.__main__ import main
from ragkit.dev.execute import ROOT, WIDGET_VIEW, NotebookError, badge, check, execute, find, normalise, repository

code, words = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell


def stored(path, *cells):
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)
    return path


@pytest.mark.slow
def test_a_notebook_is_run_by_this_python_and_stored_in_one_form(tmp_path, monkeypatch, capsys):
    elsewhere = tmp_path / "data" / "kernels" / "python3"  # a kernel that a user has registered under the same name
    elsewhere.mkdir(parents=True)
    (elsewhere / "kernel.json").write_text(json.dumps({"argv": ["/no/python"], "display_name": "x", "language": "y"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "data"))
    show = (
        "import sys\nfrom ipywidgets import IntSlider\nfrom IPython.display import display, Image\n"
        "print(sys.executable)\nprint('and more')\ndisplay(IntSlider(value=3))\nblock = bytearray(300_000_000)\n"
        "import time; time.sleep(1)\nlen(block)"
    )
    picture = (
        "display({'image/png': 'aGVsbG8=', 'text/plain': 'a dot'}, raw=True, "
        "metadata={'image/png': {'alt': 'a dot', 'secret': 1}, 'needs_background': 'light'})"
    )
    path = stored(tmp_path / "42_answer.ipynb", words("# 42 · Answer\n\n**Goal.**"), code(show), code(picture))
    assert main(["execute", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "42_answer" in printed and "peak MB" in printed
    assert int(printed.split()[-1]) > 300
    notebook = nbformat.read(path, as_version=4)
    assert [cell.id for cell in notebook.cells] == ["cell-00", "cell-01", "cell-02"]
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.cells[0].source == f"# 42 · Answer\n\n{badge('42_answer')}\n\n**Goal.**"
    stream, slider, last = notebook.cells[1].outputs
    assert stream.text == f"{sys.executable}\nand more\n"
    assert slider.data == {"text/plain": "IntSlider(value=3)"} and last.execution_count == 1
    assert notebook.cells[2].outputs[0].metadata == {"image/png": {"alt": "a dot"}}
    before = path.read_bytes()
    execute(path)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_cell_that_fails_is_shown_and_the_notebook_stays_as_it_was(tmp_path, capsys):
    path = stored(tmp_path / "a.ipynb", code("x = 7"), code("x / 0"))
    good = stored(tmp_path / "b.ipynb", code("'fine'"))
    before = path.read_bytes()
    assert main(["execute", str(path), str(good)]) == 1
    told = capsys.readouterr()
    assert "a.ipynb" in told.err and "x / 0" in told.err and "ZeroDivisionError" in told.err
    assert path.read_bytes() == before
    assert "fine" in good.read_text(), "the others are still run"


@pytest.mark.slow
def test_a_kernel_that_dies_and_a_cell_without_end_are_told(tmp_path):
    dying = stored(tmp_path / "a.ipynb", code("import os; os._exit(1)"))
    with pytest.raises(NotebookError, match="a.ipynb: its kernel died"):
        execute(dying)
    endless = stored(tmp_path / "b.ipynb", code("import time; time.sleep(60)"))
    with pytest.raises(NotebookError, match="more than 2 s"):
        execute(endless, timeout=2)


@pytest.mark.slow
def test_check_finds_what_is_stored_and_not_printed(tmp_path, capsys):
    path = stored(tmp_path / "a.ipynb", words("# a"), code("print('in', 1.5, 's')"), code("1 + 1"))
    assert main(["execute", str(path)]) == 0
    assert main(["execute", "--check", str(path)]) == 0
    changed = path.read_text().replace('"2"', '"3"')
    path.write_text(changed)
    with pytest.raises(NotebookError, match="a.ipynb"):
        check(path)
    assert main(["execute", "--check", str(path)]) == 1
    assert path.read_text() == changed
    assert "1 + 1" in capsys.readouterr().err


def test_outputs_that_only_a_kernel_can_show_are_left_out():
    view = nbformat.v4.new_output("display_data", data={WIDGET_VIEW: {"model_id": "1"}})
    notebook = nbformat.v4.new_notebook(cells=[words("# 42 · x"), code("form", outputs=[view])])
    notebook.metadata["widgets"] = {"state": {}}
    notebook.cells[1].metadata.update(tags=["nbval-ignore-output"], collapsed=True)
    cell = normalise(notebook, "42_x").cells[1]
    assert cell.outputs == [] and cell.metadata == {"tags": ["nbval-ignore-output"]}
    assert "widgets" not in notebook.metadata


def test_a_badge_follows_the_repository_of_pyproject():
    old = badge("42_x").replace(repository(), "someone/else")
    notebook = nbformat.v4.new_notebook(cells=[words(f"# 42 · x\n\n{old}\n\nwords")])
    assert normalise(notebook, "42_x").cells[0].source == f"# 42 · x\n\n{badge('42_x')}\n\nwords"
    assert f"https://github.com/{repository()}" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_notebooks_are_found_by_number_and_a_wrong_one_is_told(capsys):
    (quickstart,) = find(["00"])
    assert quickstart.stem == "00_quickstart" and len(find([])) == 11
    assert main(["execute", "77"]) == 2
    assert 'no notebook "77"' in capsys.readouterr().err
