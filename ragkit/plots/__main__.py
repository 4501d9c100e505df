"""`python -m ragkit.plots RUN_FOLDER picture.png` draws the evaluation of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ragkit.evaluation import EvaluationResult
from ragkit.plots import before_after
from ragkit.runs import RunError


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
    before_after({label: EvaluationResult.from_dict(value) for label, value in scores.items()}).save(given[1])


if __name__ == "__main__":
    main()
