"""The Triton backend in Triton's interpreter, on the CPU, against float64 PyTorch (the checks of relconv_cases.py).

The interpreter must be chosen before the kernels are imported, hence processes of their own. It does not see races,
alignment, or what the compiler makes of a kernel; `pytest -m gpu` runs the same checks on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import relconv_cases  # noqa: E402

pytestmark = pytest.mark.slow
PARTS = 2


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    """What the checks found, by name."""
    job = Path(relconv_cases.__file__)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    jobs = [
        subprocess.Popen(
            [sys.executable, str(job), str(part), str(PARTS)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in range(PARTS)
    ]
    lines = []
    for process in jobs:
        out, errors = process.communicate(timeout=1200)
        lines += out.splitlines()
        done = lines[-1][:200] if lines else "nothing"  # a segmentation fault (-11) is an address out of bounds
        assert process.returncode == 0, f"exit code {process.returncode} after {done}\n{errors[-4000:]}"
    return {line["check"]: line for line in map(json.loads, lines)}


@pytest.mark.parametrize("name", relconv_cases.all_checks())
def test_in_the_interpreter(found, name):
    results = found[name]["results"]
    assert results
    bad = [r for r in results if not r["ok"]]
    assert not bad, json.dumps(bad, indent=1)
