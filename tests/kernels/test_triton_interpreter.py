"""The Triton backend in Triton's interpreter, on the CPU, against float64 PyTorch (the checks of relconv_cases.py).

The interpreter does not see races, alignment, or what the compiler makes of a kernel; `pytest -m gpu` runs the same
checks on a GPU.
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

import relconv_cases  # noqa: E402
from triton_tools import interpreted  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    return interpreted(relconv_cases.__file__)


@pytest.mark.parametrize("name", relconv_cases.all_checks())
def test_in_the_interpreter(found, name):
    results = found[name]["results"]
    assert results
    bad = [r for r in results if not r["ok"]]
    assert not bad, json.dumps(bad, indent=1)
