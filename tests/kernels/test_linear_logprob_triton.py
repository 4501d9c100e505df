"""The Triton kernels of `token_logprobs` without a GPU: compiled for each architecture, and run in the interpreter.

No shipped form may spill, use more shared memory than the architecture has, compute in float64, or use atomics. The
interpreter's results are held against float64 PyTorch (the checks of logprob_cases.py); it does not see races,
alignment, or what the compiler makes of a kernel: `pytest -m gpu` runs the same checks on a GPU.
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

import logprob_cases  # noqa: E402
import torch  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from ragkit_kernels.linear_logprob.triton_backend import spans, tile_of  # noqa: E402
from ragkit_kernels.linear_logprob.triton_shipped import shipped_launches  # noqa: E402
from triton_tools import STORAGE, Config, compile_all, faults, interpreted, table  # noqa: E402

# sm_75 has the row kernels alone.
COLUMNS = [(75, "fp16"), (75, "fp32"), *((arch, n) for arch in (80, 86, 90) for n in ("fp16", "bf16", "fp32"))]


@pytest.fixture(scope="module")
def compiled():
    jobs = [(Config.of(launch, n), arch) for arch, n in COLUMNS for launch in shipped_launches(STORAGE[n], arch)]
    return compile_all(dict.fromkeys(jobs))


@pytest.mark.slow
def test_every_shipped_configuration(compiled, capsys):
    with capsys.disabled():
        print("\n" + table(compiled, COLUMNS))
    assert not faults(compiled), "\n".join(faults(compiled))
    assert {(c.arch, c.storage) for c in compiled} == set(COLUMNS)
    fused = [c for c in compiled if c.label.startswith("fused")]
    assert {(c.arch, c.storage) for c in fused} == {(arch, n) for arch, n in COLUMNS if arch >= 80}
    for c in fused:  # the products are the tensor cores' work, fed while they run if rows are aligned
        assert ("wgmma" if c.arch == 90 else "mma.sync") in c.ptx, c.label
    slow = [c for c in fused if not c.copies_async]
    assert {(c.arch, c.storage) for c in slow} == {(80, "bf16"), (86, "bf16"), (90, "bf16")}  # D = 2049
    hopper = [c for c in fused if c.arch == 90 and c not in slow]
    assert all(2 * (c.shared + 1024) <= 228 << 10 and c.registers * 2 * 128 <= 65536 for c in hopper)  # two at a time


@given(st.integers(1, 300), st.integers(1, 2400), st.integers(1, 300))
def test_programs_share_the_vocabulary_evenly(tiles, blocks, places):
    span = spans(tiles, blocks, places)
    splits = -(-blocks // span)
    assert 1 <= span <= blocks and (splits - 1) * span < blocks  # no program without columns
    assert splits <= max(1, -(-4 * places // tiles))
    if blocks >= 8 * places and tiles <= places:  # work enough for everyone: at least 70% of the places are used
        waves = -(-tiles * splits // places)
        assert tiles * blocks >= 0.7 * waves * span * places


def test_a_few_tokens_still_use_the_whole_gpu():
    tile, _, resident = tile_of(90, torch.bfloat16)
    blocks = -(-128_256 // tile["BLOCK_V"])
    assert -(-blocks // spans(1, blocks, 132 * resident)) >= 200


@pytest.fixture(scope="module")
def found():
    return interpreted(logprob_cases.__file__, list(logprob_cases.all_checks()))


@pytest.mark.slow
@pytest.mark.parametrize("name", logprob_cases.all_checks())
def test_in_the_interpreter(found, name):
    results = found[name]["results"]
    assert results
    bad = [r for r in results if not r["ok"]]
    assert not bad, json.dumps(bad, indent=1)
