"""What every widget of ragkit shows with and without a front end, on ipywidgets 7 and 8."""

from __future__ import annotations

import subprocess
import sys

import pytest
from IPython.core.formatters import DisplayFormatter

from ragkit.widgets.base import StaticBox, accordion, code_html, error_html, set_tooltip, tabs, widgets

VIEW = "application/vnd.jupyter.widget-view+json"


class Box(StaticBox):
    def static_html(self):
        return "<b>static</b>"

    def static_text(self):
        return "static"


def test_a_cell_shows_the_widget_and_the_static_form():
    box = Box([widgets.Text()])
    bundle, _ = DisplayFormatter().format(box)
    assert bundle["text/plain"] == "static" and bundle["text/html"] == "<b>static</b>"
    assert bundle[VIEW]["model_id"] == box.model_id


def test_what_display_publishes_is_the_same(monkeypatch):
    """ipywidgets 7 would publish by itself, without the static form."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.display import display

    shell = InteractiveShell.instance()
    try:
        published = []
        monkeypatch.setattr(shell.display_pub, "publish", lambda data, *a, **k: published.append(data))
        display(Box())
    finally:
        InteractiveShell.clear_instance()
    (data,) = published
    assert {"text/plain": "static", "text/html": "<b>static</b>"}.items() <= data.items() and VIEW in data


def test_tooltips_titles_and_folds():
    for widget in (widgets.Text(), widgets.Button(), widgets.Dropdown(), widgets.Checkbox()):
        assert set_tooltip(widget, "help") is widget
        state = widget.get_state()
        assert "help" in (state.get("tooltip"), state.get("description_tooltip"))
    fold, open_fold = accordion(widgets.Text(), "one"), accordion(widgets.Text(), "one", is_open=True)
    assert (fold.selected_index, open_fold.selected_index) == (None, 0)
    pages = tabs([widgets.HTML(), widgets.HTML()], ["a", "b"])
    assert [pages.get_title(place) for place in (0, 1)] == ["a", "b"] and fold.get_title(0) == "one"


def test_html_is_escaped_and_nothing_is_said_by_colour_alone():
    assert "&lt;b&gt;" in code_html("<b>", "what") and 'aria-label="what"' in code_html("", "what")
    assert error_html("") == ""
    assert "✗" in error_html("<x>") and 'role="alert"' in error_html("x") and "<x>" not in error_html("<x>")


def test_without_ipywidgets_the_package_imports_and_its_names_say_what_to_install():
    code = (
        "import sys; sys.modules['ipywidgets'] = None\n"
        "import ragkit.widgets\n"
        "try: ragkit.widgets.ConfigForm\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 'install it with: pip install "ragkit[notebooks]"' in done.stdout


def test_importing_ragkit_brings_no_widgets():
    code = "import sys, ragkit, ragkit.widgets, ragkit.presets, ragkit.run_text; print('ipywidgets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "False", done.stderr


def test_an_unknown_name_is_an_attribute_error():
    import ragkit.widgets

    with pytest.raises(AttributeError, match="no attribute 'ConfigFrom'"):
        _ = ragkit.widgets.ConfigFrom
