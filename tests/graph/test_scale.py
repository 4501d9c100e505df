"""The scale benchmark, small."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource")  # not on Windows
SCRIPT = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks" / "graph_scale.py"


@pytest.mark.slow
def test_the_scale_benchmark_runs(tmp_path):
    table = tmp_path / "scale.csv"
    command = [sys.executable, str(SCRIPT), "--entities", "20000", "--triples", "60000", "--relations", "50"]
    command += ["--csv", str(table), "--scratch", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "first load" in done.stdout and "second load" in done.stdout
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["entities"], row["triples"]) for row in rows] == [
        ("first load", "20000", "60000"),
        ("second load", "20000", "60000"),
    ]
    assert all(0 < float(row["seconds"]) < 60 and 100 < float(row["peak_mib"]) < 4096 for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["scale.csv"]  # the scratch folder is gone
