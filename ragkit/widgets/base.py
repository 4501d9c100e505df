"""What all widgets of ragkit share: how they show without a Jupyter front end, and what differs in ipywidgets 7 and 8.

Other modules take ipywidgets from here (`from ragkit.widgets.base import widgets`): where it is missing, the import
says what to install.
"""

from __future__ import annotations

import html
from abc import ABCMeta, abstractmethod
from collections.abc import Sequence
from typing import Any

from ragkit.optional import require

widgets: Any = require("ipywidgets", "notebooks")

# Colours of the front end's theme, light or dark, with a fall-back where there is none (GitHub, Colab).
TEXT = "var(--jp-ui-font-color1, currentColor)"
QUIET = "var(--jp-ui-font-color2, currentColor)"
BORDER = "var(--jp-border-color2, #888)"
ERROR = "var(--jp-error-color1, #b3261e)"
CODE = "var(--jp-code-font-family, monospace)"


class _Meta(ABCMeta, type(widgets.VBox)):  # type: ignore[misc]
    """Of widgets with abstract methods."""


class StaticBox(widgets.VBox, metaclass=_Meta):
    """A column of widgets that also shows itself where there are no widgets.

    What a cell shows holds the widget and, for GitHub, nbviewer, the docs and a notebook that has not run yet, the
    static form in HTML and in plain text. Both must be the same each time: no times, no machine paths.
    """

    _ipython_display_ = None  # ipywidgets 7 shows itself through this, and would leave the static form out

    @abstractmethod
    def static_html(self) -> str:
        """The widget without widgets, as HTML that needs no style sheet."""

    @abstractmethod
    def static_text(self) -> str:
        """The widget without widgets, as plain text."""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **options: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": self.static_text(), "text/html": self.static_html()}
        if self._view_name is not None:
            view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
            bundle["application/vnd.jupyter.widget-view+json"] = view
        if hasattr(self, "_handle_displayed"):  # ipywidgets 7: callbacks of on_displayed
            self._handle_displayed()
        return bundle

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.static_text())


def set_tooltip(widget: Any, text: str) -> Any:
    """Sets the text shown on hover and read by screen readers; gives the widget back.

    ipywidgets 8 calls it `tooltip` everywhere, 7 `description_tooltip` on all but buttons.
    """
    setattr(widget, "tooltip" if widget.has_trait("tooltip") else "description_tooltip", text)
    return widget


def set_titles(container: Any, titles: Sequence[str]) -> None:
    """Names the pages of a `Tab` or an `Accordion`."""
    for place, title in enumerate(titles):
        container.set_title(place, title)


def accordion(child: Any, title: str, is_open: bool = False) -> Any:
    """One widget under a heading that folds it away; several stay open side by side."""
    box = widgets.Accordion(children=[child], selected_index=0 if is_open else None)
    set_titles(box, [title])
    return box


def tabs(children: Sequence[Any], titles: Sequence[str]) -> Any:
    """Pages behind named tabs, the first one open."""
    box = widgets.Tab(children=list(children), selected_index=0)
    set_titles(box, titles)
    return box


def escape(text: Any) -> str:
    """Text made safe for HTML."""
    return html.escape(str(text))


def code_html(text: str, label: str) -> str:
    """Text to copy: a click selects all of it.

    Args:
        text: What is shown.
        label: What it is, for screen readers.
    """
    return (
        f'<pre aria-label="{escape(label)}" tabindex="0" style="user-select: all; white-space: pre-wrap; '
        f"overflow-wrap: anywhere; line-height: 1.4; margin: 0; padding: 8px; font-family: {CODE}; color: {TEXT}; "
        f'border: 1px solid {BORDER}">{escape(text)}</pre>'
    )


def error_html(message: str) -> str:
    """A message about something wrong, which screen readers read out at once; nothing for an empty one."""
    if not message:
        return ""
    return f'<div role="alert" style="color: {ERROR}; line-height: 1.4"><b>✗</b> {escape(message)}</div>'
