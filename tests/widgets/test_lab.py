"""Notebooks in a real JupyterLab, in a real browser: what a person does with the form and the panel, and sees."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import nbformat
import pytest
from holding import Hold

from ragkit.config import LSRConfig
from ragkit.dev.lab import JupyterLab, chromium
from ragkit.widgets.form_words import FIRST

ROOT = Path(__file__).parents[2]
MISSING = [name for name in ("playwright", "jupyterlab") if importlib.util.find_spec(name) is None]
MISSING += [] if chromium() else ["chromium"]
pytestmark = [
    pytest.mark.slow,
    # CI has all of it: there a skip would hide that nothing was tested
    pytest.mark.skipif(bool(MISSING) and not os.environ.get("RAGKIT_CI"), reason=f"missing: {', '.join(MISSING)}"),
]
FORM, PANEL = "\nform", "\npanel"  # how the cells end that show them
GRAPH = """from ragkit.graph import KnowledgeGraph
from ragkit.widgets import GraphView

GraphView(KnowledgeGraph.load("small_world"), entities=["nicolaus copernicus"])"""
WAIT = 300_000  # milliseconds that something may take to show, on a busy machine
HELD = 12  # step at which a training is looked at and stopped


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Notebooks 00 and 03 with fewer questions, and a graph view at their end."""
    path = tmp_path_factory.mktemp("lab")
    for name in ("00_quickstart", "03_finetune_retriever_lsr"):
        notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
        knobs = next(cell for cell in notebook.cells if "N_TRAIN, N_TEST =" in cell.source)
        knobs.source = re.sub(r"N_TRAIN, N_TEST = \d+, \d+", "N_TRAIN, N_TEST = 64, 24", knobs.source)
        assert "64, 24" in knobs.source
        notebook.cells.append(nbformat.v4.new_code_cell(GRAPH, id="graph"))
        nbformat.write(notebook, path / f"{name}.ipynb")
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    path = Path(os.environ.get("RAGKIT_SCREENSHOTS") or tmp_path_factory.mktemp("pictures"))
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="module")
def hold(tmp_path_factory):
    """Holds the training of a kernel at a step: what is shown then stays, and Stop does not come too late."""
    return Hold(tmp_path_factory.mktemp("hold"))


@pytest.fixture(scope="module")
def lab(folder, hold):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hold.environment.items():
            patch.setenv(name, value)
        with JupyterLab(folder) as lab:
            yield lab


def see(panel, text):
    """Waits until the panel says something."""
    panel.get_by_text(text).first.wait_for(timeout=WAIT)


def see_live_plot(panel):
    panel.locator("svg[role=img]").first.wait_for(timeout=WAIT)
    see(panel, re.compile(rf"Training: step {HELD} of "))
    panel.locator(".progress-bar").wait_for(timeout=WAIT)  # to be seen it must have a width


def test_form_and_panel_of_notebook_03(lab, hold, pictures):
    notebook = lab.open("03_finetune_retriever_lsr.ipynb")
    notebook.run_above("print(form.code())")
    form = notebook.output(FORM)
    steps = notebook.fill("train.max_steps", "abc", form)
    row = steps.locator("xpath=ancestor::div[contains(@class, 'widget-hbox')][1]")
    row.get_by_role("alert").filter(has_text="abc").wait_for(timeout=WAIT)
    notebook.fill("top_k", "0", form)
    form.get_by_text("2 settings are wrong").wait_for(timeout=WAIT)
    notebook.fill("train.max_steps", "40", form)
    notebook.fill("top_k", "6", form)
    form.get_by_text("All settings are valid").wait_for(timeout=WAIT)
    row.get_by_role("alert").wait_for(state="detached", timeout=WAIT)

    keys = FIRST[LSRConfig]
    form.get_by_label(keys[0], exact=True).focus()
    passed = [notebook.focused()]
    for _ in range(3 * len(keys)):
        notebook.page.keyboard.press("Tab")
        passed.append(notebook.focused())
    assert [name for name in passed if name in keys] == keys
    notebook.shot(form, pictures / "form_light.png")

    notebook.run("print(form.code())", PANEL)
    see(notebook.output("print(form.code())"), re.compile(r'"max_steps": ?40'))
    panel = notebook.output(PANEL)
    hold.at(HELD)
    notebook.button("Start", panel).press("Enter")  # the keyboard does what the mouse does
    see_live_plot(panel)
    notebook.shot(panel, pictures / "running_light.png")
    notebook.press("Stop", panel)
    see(panel, re.compile("Stopping"))
    hold.let_go()
    see(panel, re.compile(rf"Stopped at step {HELD + 1} of 40; .*checkpoint"))
    notebook.shot(panel, pictures / "stopped_light.png")
    notebook.button("Resume", panel).press("Space")
    see(panel, "Finished: 40 steps")
    table = panel.locator("table").first
    table.wait_for(timeout=WAIT)
    assert {"before", "after", "recall@1"} <= set(re.split(r"\s+", table.inner_text()))
    notebook.shot(panel, pictures / "finished_light.png")
    notebook.shot(table, pictures / "table_light.png")

    notebook.run("GraphView(KnowledgeGraph")
    graph = notebook.output("GraphView(KnowledgeGraph")
    graph.locator("svg[role=img]").first.wait_for(timeout=WAIT)
    notebook.shot(graph, pictures / "graph_light.png")
    notebook.use_theme("dark")
    for shown, name in ((form, "form"), (panel, "finished"), (table, "table"), (graph, "graph")):
        notebook.shot(shown, pictures / f"{name}_dark.png")


def test_notebook_00_with_the_keyboard(lab, hold):
    notebook = lab.open("00_quickstart.ipynb")
    notebook.run_above("print(form.code())")
    notebook.fill("train.max_steps", "50", notebook.output(FORM))
    notebook.run("print(form.code())", PANEL)
    panel = notebook.output(PANEL)
    hold.at(HELD)
    notebook.button("Start", panel).press("Enter")
    see_live_plot(panel)
    notebook.button("Stop", panel).press("Space")
    see(panel, re.compile("Stopping"))
    hold.let_go()
    see(panel, re.compile(rf"Stopped at step {HELD + 1} of 50; .*checkpoint"))
