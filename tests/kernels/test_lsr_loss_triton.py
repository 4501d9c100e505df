"""The LSR loss's Triton kernels without a GPU: in the interpreter against float64, and compiled for three GPUs."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

import lsr_loss_cases  # noqa: E402
from ragkit_kernels.lsr_loss.triton_shipped import shipped_launches  # noqa: E402
from triton_tools import COLUMNS, compile_shipped, faults, interpreted, table  # noqa: E402


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    return interpreted(lsr_loss_cases.__file__, list(lsr_loss_cases.all_checks()))


@pytest.mark.slow
@pytest.mark.parametrize("name", lsr_loss_cases.all_checks())
def test_in_the_interpreter(found, name):
    results = found[name]["results"]
    assert results
    bad = [r for r in results if not r["ok"]]
    assert not bad, json.dumps(bad, indent=1)


@pytest.mark.slow
@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.long)])
def test_every_shipped_configuration(everything, capsys):
    """No spilled register, no float64, no atomics; and what a launcher may choose is on the list."""
    compiled = compile_shipped(shipped_launches, everything=everything)
    with capsys.disabled():
        print("\n" + table(compiled))
    assert not faults(compiled), "\n".join(faults(compiled))
    assert {(c.arch, c.storage) for c in compiled} == set(COLUMNS)
    kernels = {c.label.split()[0] for c in compiled}
    assert kernels == {"row", "wide", "embedding", "dot", "embedding_backward"}
