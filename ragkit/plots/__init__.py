"""Pictures: losses, scores, distributions and graphs, each with its description in words.

Every function but `loss_log` (a table) returns a `Plot`. `python -m ragkit.plots RUN_FOLDER picture.png` draws the
evaluation of a run.
"""

from __future__ import annotations

from ragkit.plots.distributions import distributions
from ragkit.plots.graphs import degree_distribution, relation_distribution
from ragkit.plots.histograms import histogram
from ragkit.plots.log import LossLog, loss_log
from ragkit.plots.loss import loss_curves
from ragkit.plots.plot import Plot
from ragkit.plots.scores import before_after, recall_curves

__all__ = [
    "LossLog",
    "Plot",
    "before_after",
    "degree_distribution",
    "distributions",
    "histogram",
    "loss_curves",
    "loss_log",
    "recall_curves",
    "relation_distribution",
]
