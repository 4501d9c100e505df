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


NAMES = list(relconv_cases.all_checks())
# The dearest: PNA on graphs on which sum and max are tested, while another graph tests PNA.
LONG = [name for name in NAMES if "-pna-fp32" in name and ("split_size" in name or "one_relation" in name)]


@pytest.fixture(scope="module")
def found(request) -> dict[str, dict]:
    chosen = NAMES if request.config.getoption("everything") else [name for name in NAMES if name not in LONG]
    return interpreted(relconv_cases.__file__, chosen)


def test_what_is_left_out_is_little():
    assert len(LONG) == 2


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in NAMES])
def test_in_the_interpreter(found, name):
    results = found[name]["results"]
    assert results
    bad = [r for r in results if not r["ok"]]
    assert not bad, json.dumps(bad, indent=1)
