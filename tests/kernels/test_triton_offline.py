"""Every shipped form of the Triton kernels, compiled for sm_75, sm_80 and sm_90 without a GPU.

None may spill, use more shared memory than the architecture has, compute in float64, or use atomics.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest

pytest.importorskip("triton")

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from ragkit_kernels.relational_conv.triton_backend import tile_of  # noqa: E402
from ragkit_kernels.relational_conv.triton_shipped import shipped_launches  # noqa: E402
from ragkit_kernels.triton_tools import Launch, recording  # noqa: E402
from triton_tools import COLUMNS, SHARED_MEMORY, Config, compile_one, compile_shipped, faults, table  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.long)])
def test_every_shipped_configuration(everything, capsys):
    compiled = compile_shipped(shipped_launches, everything=everything)
    with capsys.disabled():
        print("\n" + table(compiled))
    assert not faults(compiled), "\n".join(faults(compiled))
    assert {(c.arch, c.storage) for c in compiled} == set(COLUMNS)
    gathers = [c for c in compiled if c.label.split()[0] in ("gather", "select", "weight")]
    assert gathers and all(c.copies_async == (c.arch >= 80) for c in gathers)


def test_every_tile_that_a_launcher_may_choose_is_shipped():
    shipped = {
        (launch.args["AGGREGATE"] if launch.args["AGGREGATE"] in ("max", "pna") else "sum", *tile(launch.args))
        for launch in shipped_launches(torch.float16)
        if launch.name in ("gather_kernel", "select_kernel", "weight_kernel")
    }
    wanted = {
        (kind, *tile(tile_of(B, D, kind)))
        for kind, B, D in itertools.product(
            ("sum", "max", "pna"), (1, 2, 3, 4, 5, 8, 9, 64), (1, 31, 64, 128, 129, 512, 600)
        )
    }
    assert wanted <= shipped


def tile(args: dict) -> tuple:
    return tuple(args[k] for k in ("LANES", "BLOCK_B", "BLOCK_D", "STAGES"))


@triton.jit
def crowded_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    tl.store(out + at, value * tl.sum(value))  # every value is alive until the sum is there


@triton.jit
def atomic_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(out + at % 3, tl.load(x + at))


@triton.jit
def double_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, (tl.load(x + at).to(tl.float64) * 0.1).to(tl.float32))


def bad(kernel, block=128, **options) -> Config:
    x = torch.zeros(4)
    return Config.of(Launch(kernel, {"x": x, "out": x, "BLOCK": block}, 4, options.get("max_registers", 128)))


@pytest.mark.parametrize("arch", [75, 80, 90])
def test_the_gate_sees_what_it_must_not_find(arch):
    assert any("spilled" in fault for fault in compile_one(bad(crowded_kernel, 8192, max_registers=32), arch).faults())
    assert compile_one(bad(atomic_kernel), arch).faults() == ["atomics"]
    double = compile_one(bad(double_kernel), arch)
    assert double.faults() == ["float64 arithmetic"]
    greedy = dataclasses.replace(double, ptx="", shared=SHARED_MEMORY[arch] + 1)
    assert greedy.faults() == [f"{SHARED_MEMORY[arch] + 1} bytes of shared memory"]


def test_a_recorded_launch_is_typed_as_triton_would():
    from ragkit_kernels.triton_tools import launch

    memory = torch.zeros(64, dtype=torch.float16)
    with recording() as launches:
        launch(atomic_kernel, (1,), memory, memory[1:], BLOCK=16)
    (one,) = launches
    assert one.types() == {"x": "*fp16", "out": "*fp16", "BLOCK": "constexpr"}
    assert one.divisible() == ["x"]  # the second pointer is two bytes off
    assert one.constants() == {"BLOCK": 16}
    assert not memory.any(), "a recorded launch does not run"
