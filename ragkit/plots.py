"""Pictures of a run, drawn from its files: `python -m ragkit.plots RUN_FOLDER picture.png`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ragkit.evaluation import EvaluationResult
from ragkit.optional import require
from ragkit.runs import RunError

# Colours that stay apart for colour-blind eyes (Okabe and Ito) with hatches, so that nothing hangs on colour alone.
LOOKS = (("#bbbbbb", ""), ("#56b4e9", "//"), ("#0072b2", ""), ("#ffffff", ".."), ("#ffffff", "xx"))


def before_after(
    scores: Mapping[str, EvaluationResult], metrics: Sequence[str] = ("recall@1", "mrr", "em", "f1")
) -> Any:
    """Bars of several systems side by side, with the 95 % interval of each mean.

    Args:
        scores: Label -> scores; a metric that a system does not have is left out.
        metrics: What to draw, left to right.

    Returns:
        A matplotlib `Figure` without pyplot state; it shows itself in Jupyter.
    """
    figure = require("matplotlib.figure", extra="notebooks").Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(scores)
    for number, (label, result) in enumerate(scores.items()):
        face, hatch = LOOKS[number % len(LOOKS)]
        named = False
        for place, metric in enumerate(metrics):
            value = result.metrics.get(metric)
            if value is None or math.isnan(value.mean):
                continue
            at = place + (number - (len(scores) - 1) / 2) * width
            errors = [[value.mean - value.low], [value.high - value.mean]]
            axes.bar(
                at,
                value.mean,
                width * 0.92,
                yerr=errors,
                color=face,
                hatch=hatch,
                edgecolor="#333333",
                linewidth=0.8,
                error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333333"},
                label=None if named else label,
            )
            named = True
            axes.text(at, value.high + 0.015, f"{value.mean:.2f}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(metrics)), metrics)
    axes.set_ylim(0, 1.12)
    axes.set_ylabel("mean on held-out questions")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=len(scores), frameon=False, fontsize=9)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the evaluation of a run.

    Raises:
        RunError: The run folder has no `evaluation.json`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) != 2:
        raise SystemExit("python -m ragkit.plots RUN_FOLDER picture.png")
    path = Path(given[0]) / "evaluation.json"
    if not path.is_file():
        raise RunError(f"{path}: there is no evaluation in this run folder")
    scores = json.loads(path.read_text(encoding="utf-8"))
    figure = before_after({label: EvaluationResult.from_dict(value) for label, value in scores.items()})
    figure.savefig(given[1], dpi=110)


if __name__ == "__main__":
    main()
