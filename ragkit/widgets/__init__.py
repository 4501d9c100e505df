"""Forms, the run panel and the graph view for Jupyter: core ipywidgets only, from 7.7.1 (Colab) on.

Names are imported on first use, so that this package can be imported without ipywidgets.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ragkit.widgets' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
