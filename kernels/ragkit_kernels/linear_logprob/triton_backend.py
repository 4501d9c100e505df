"""Triton backend of `token_logprobs`: hands tensors on a GPU to the kernels of triton_kernels.py.

`fused_forward` needs sm_80; `reduce_rows`, `merge` and `gradient_rows`, with the meaning that torch_rows.py gives
them, run on any GPU: they have no `tl.dot`, which is useless before that.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ragkit_kernels.linear_logprob import triton_kernels
from ragkit_kernels.linear_logprob.chunked import Options
from ragkit_kernels.triton_tools import launch

ROW = {"BLOCK": 2048, "STAGES": 2}
GRADIENT_BLOCK = 2048
MERGE = {"ROWS": 128, "STAGES": 3}


def tile_of(arch: int, dtype: torch.dtype, aligned: bool = True) -> tuple[dict[str, int | str], int, int]:
    """The fused kernel's tile for an architecture (80, 90, ...), its warps, and programs that a processor holds.

    All spill nothing and fit into the 99 KiB of shared memory of the smallest. On Hopper two programs share a
    processor, so that one multiplies while the other takes exponentials; rows that are not aligned to 16 numbers must
    go through registers, of which that tile has none left.
    """
    if dtype == torch.float32:  # three TF32 products on the tensor cores for each: nearly float32
        return {"PRECISION": "tf32x3", "BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_D": 32, "STAGES": 3}, 4, 2
    if arch == 90 and aligned:
        return {"PRECISION": "ieee", "BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_D": 64, "STAGES": 3}, 4, 2
    return {"PRECISION": "ieee", "BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_D": 32, "STAGES": 4}, 8, 1


@functools.lru_cache(maxsize=4096)
def spans(tiles: int, blocks: int, places: int) -> int:
    """Blocks of columns that a program takes, so that all programs end at about the same time.

    Args:
        tiles: Tiles of rows.
        blocks: Blocks of columns, all in all.
        places: Programs that run at the same time.

    Returns:
        The number with the least (waves of programs) · (blocks of each + 1 for its start), and of equal ones the
        largest, which leaves fewest partial results.
    """
    most = min(blocks, max(1, -(-4 * places // tiles)))  # splits; more than four waves gain nothing

    def cost(span: int) -> tuple[int, int]:
        waves = -(-tiles * -(-blocks // span) // places)
        return waves * (span + 1), -span

    return min({-(-blocks // splits) for splits in range(1, most + 1)}, key=cost)


def fused_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: Options,
    arch: int | None = None, span: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(log-probabilities, log-sum-exp) [T] without logits in memory.

    Args:
        hidden: [T, D], any strides.
        weight: [V, D], any strides.
        targets: [T].
        bias: [V] or None.
        options: Of the call; there is no budget to keep.
        arch: Architecture to choose the tile for; None: that of the device.
        span: Blocks of columns per program; None: so that the device is evenly busy.
    """
    (T, D), V = hidden.shape, weight.shape[0]
    if T == 0:
        return hidden.new_empty(0, dtype=torch.float32), hidden.new_empty(0, dtype=torch.float32)
    if arch is None:
        major, minor = torch.cuda.get_device_capability(hidden.device)
        arch = 10 * major + minor
    aligned = all(s == 1 or s % 16 == 0 for t in (hidden, weight) for s in t.stride())
    tile, warps, resident = tile_of(arch, hidden.dtype, aligned)
    tiles, blocks = -(-T // int(tile["BLOCK_T"])), -(-V // int(tile["BLOCK_V"]))
    if span is None:
        processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
        span = spans(tiles, blocks, processors * resident)
    splits = -(-blocks // span)
    top, total = (hidden.new_empty(splits, T, dtype=torch.float32) for _ in range(2))
    picked = hidden.new_empty(T, dtype=torch.float32)
    targets = targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    launch(
        triton_kernels.fused_kernel, (tiles, splits),
        hidden, *hidden.stride(), weight, *weight.stride(), targets, bias, top, total, picked, T, V, D,
        span * int(tile["BLOCK_V"]), options.inner or 0.0, options.outer, num_warps=warps, max_registers=255,
        CAPPED=options.inner is not None, EVEN=D % int(tile["BLOCK_D"]) == 0, **tile,
    )  # fmt: skip
    return merge(top, total, picked, targets, V, options.ignore_index)


def merge(
    top: Tensor, total: Tensor, picked: Tensor, targets: Tensor, vocabulary: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """(log-probability of the target, log-sum-exp) [T]; see torch_rows.merge."""
    splits, T = top.shape
    logprob, lse = (top.new_empty(T) for _ in range(2))
    launch(
        triton_kernels.merge_kernel, (-(-T // MERGE["ROWS"]),),
        top, total, picked, targets.contiguous(), logprob, lse, T, vocabulary, splits, ignore_index, **MERGE,
    )  # fmt: skip
    return logprob, lse


def reduce_rows(
    products: Tensor, bias: Tensor | None, targets: Tensor, first: int, inner: float | None, outer: float,
    top: Tensor, total: Tensor, picked: Tensor,
) -> None:  # fmt: skip
    """Largest logit, Σ exp(logit - largest) and target's logit of each row; see torch_rows.reduce_rows."""
    R, C = products.shape
    launch(
        triton_kernels.reduce_kernel, (R,),
        products, _contiguous(bias), targets.contiguous(), top, total, picked, C, first, inner or 0.0, outer,
        num_warps=8, CAPPED=inner is not None, **ROW,
    )  # fmt: skip


def gradient_rows(
    products: Tensor, bias: Tensor | None, targets: Tensor, first: int, inner: float | None, outer: float, lse: Tensor,
    grad: Tensor, ignore_index: int, out: Tensor,
) -> None:  # fmt: skip
    """Gradient of the products of a block; see torch_rows.gradient_rows."""
    R, C = products.shape
    launch(
        triton_kernels.gradient_kernel, (R, -(-C // GRADIENT_BLOCK)),
        products, _contiguous(bias), targets.contiguous(), lse, grad, out, C, first, ignore_index, inner or 0.0, outer,
        num_warps=8, CAPPED=inner is not None, BLOCK=GRADIENT_BLOCK,
    )  # fmt: skip


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()
