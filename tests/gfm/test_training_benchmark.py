"""The benchmark of a fine-tuning step, small: it compares our model with the peer before it measures."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks" / "gfm_training.py"


@pytest.mark.slow
def test_the_training_benchmark_runs(tmp_path):
    pytest.importorskip("torch_geometric")
    table = tmp_path / "training.csv"
    sizes = ["--nodes", "300", "--triples", "500", "--relations", "9", "--questions", "5", "--dim", "16"]
    sizes += ["--layers", "2", "--text-dim", "24", "--batch", "2", "--rounds", "1", "--batches", "2"]
    command = [sys.executable, str(SCRIPT), *sizes, "--no-peaks", "--csv", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "ours and the peer: loss" in done.stdout  # losses, gradients and weights agree, or it would have failed
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    methods = ["ragkit", "checkpointing", "reference", "pyg"]
    wanted = [("step", method) for method in methods] + [("epoch", "ragkit"), ("epoch", "pyg")]
    assert [(row["part"], row["method"]) for row in rows] == wanted
    assert all(float(row["ms"]) > 0 for row in rows)
