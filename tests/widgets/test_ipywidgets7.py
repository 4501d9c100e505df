"""The same kernel-side widget tests on ipywidgets 7.7.1, which is what Colab has.

The library goes into a folder of its own that stands first on the path of a second process: here stays what is here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

VERSION = "7.7.1"
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = sorted(p for p in HERE.glob("test_*.py") if p != Path(__file__) and not p.name.startswith("test_lab"))

PANEL = (
    "test_buttons_train_stop_and_resume",
    "test_scores_before_and_after_stand_in_the_table",
    "test_an_error_before_training",
    "test_warnings_and_notes_of_the_thread",
    "test_a_second_panel_watches",
    "test_a_closed_panel",
    "test_a_folder_that_is_a_file",
    "test_a_form_with_wrong_fields",
    "test_the_static_form",
    "test_without_ipywidgets",
    "_in_words",
    "test_every_state",
)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A folder that holds ipywidgets 7.7.1; RAGKIT_IPYWIDGETS7 may name one that is there."""
    given = os.environ.get("RAGKIT_IPYWIDGETS7")
    if given:
        return Path(given)
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip; set RAGKIT_IPYWIDGETS7 to a folder with ipywidgets 7.7.1")
    folder = tmp_path_factory.mktemp("ipywidgets7")
    # Without what it depends on, which is here already (ipykernel, traitlets ...), but for two small libraries.
    names = [f"ipywidgets=={VERSION}", "ipython_genutils==0.2.0", "widgetsnbextension==3.6.10"]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *names]
    free = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}  # that pins version 8
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=free)
    unreachable = ("No matching distribution", "Could not find a version", "connection", "Connection", "NewConnection")
    if done.returncode and any(words in done.stderr for words in unreachable):
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder


def python(folder, *arguments):
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("PYTEST_XDIST_WORKER", None)  # a run of its own, not a worker of this one
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment)


def test_the_second_process_really_has_the_old_version(old):
    done = python(old, "-c", "import ipywidgets; print(ipywidgets.__version__, ipywidgets.__file__)")
    version, file = done.stdout.split(maxsplit=1)
    assert version == VERSION and file.startswith(str(old)), done.stderr
    assert "test_forms.py" in [file.name for file in FILES]


@pytest.mark.slow
@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_widgets_work_on_the_old_version(old, everything):
    # Not those of whole processes: which widgets show them changes nothing in them.
    fast = ("-m", "not slow", "-p", "no:xdist", "-p", "no:cacheprovider")
    # The panel's other tests are trainings again, seen through the widgets that these show.
    chosen = () if everything else ("-k", f"not test_run_panel.py or {' or '.join(PANEL)}")
    done = python(old, "-m", "pytest", "-q", *fast, *chosen, *map(str, FILES))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 500
