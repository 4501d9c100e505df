"""Forms, the run panel and the graph view for Jupyter: core ipywidgets only, from 7.7.1 (Colab) on.

Names are imported on first use, so that this package can be imported without ipywidgets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ragkit.lazy import lazy_names

_HOME = {
    "ConfigForm": "ragkit.widgets.forms",
    "RunPanel": "ragkit.widgets.run_panel",
    "GraphView": "ragkit.widgets.graph_view",
    "StaticBox": "ragkit.widgets.base",
}
__all__ = ["ConfigForm", "GraphView", "RunPanel", "StaticBox"]

if TYPE_CHECKING:
    from ragkit.widgets.base import StaticBox
    from ragkit.widgets.forms import ConfigForm
    from ragkit.widgets.graph_view import GraphView
    from ragkit.widgets.run_panel import RunPanel


__getattr__, __dir__ = lazy_names(__name__, _HOME)
