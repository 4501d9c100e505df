"""Pictures: losses, scores, distributions and graphs, each with its description in words.

Every function returns a `Plot`. `python -m ragkit.plots RUN_FOLDER picture.png` draws the evaluation of a run.
"""

from __future__ import annotations

from ragkit.plots.loss import loss_curves
from ragkit.plots.plot import Plot
from ragkit.plots.scores import before_after

__all__ = ["Plot", "before_after", "loss_curves"]
