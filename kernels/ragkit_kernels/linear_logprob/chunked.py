"""Blocks of logits instead of all of them: library matrix products, and one pass over each block's rows.

A block is R rows × C columns of the logits. Blocks are rather wide runs of rows with few columns than the reverse: as
long as all rows fit into a block, every row of the head's weight is read once and every row of its gradient is written
once, in its final dtype. What is left over of a block is a maximum and a sum per row, merged at the end in a fixed
order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ragkit_kernels.precision import accumulate, keeps_sums

CPU_LOGITS = 2**20
"""Logits of a block on a CPU: 4 MiB in float32, which stays in its caches while the rows are worked on."""

GPU_BYTES = 2**28
"""Bytes of a block on a GPU: enough that the library's products run at full speed."""

MOST_ROWS = {"cpu": 512, "other": 8192}
FEWEST_COLUMNS = 256  # below that, rows are given up instead


@dataclass(frozen=True)
class Options:
    """What belongs to a call besides its tensors.

    Attributes:
        inner, outer: As `reference.scaling` gives them.
        ignore_index: Target of rows that count 0.
        budget: Most logits of a block; 0: the device's default.
    """

    inner: float | None
    outer: float
    ignore_index: int
    budget: int


def block_shape(
    rows: int, vocabulary: int, dim: int, budget: int, device: torch.device, narrow: bool
) -> tuple[int, int]:
    """(R, C) of a block, with R · C <= budget.

    Args:
        rows, vocabulary, dim: T, V, D.
        budget: Most logits; 0: the default.
        device: Where the block is.
        narrow: Operands are converted to float32 first, block by block: on a CPU, or of bfloat16 on a T4.
    """
    cpu, given = device.type == "cpu", budget > 0
    budget = budget or (CPU_LOGITS if cpu else GPU_BYTES // 6)  # float32 logits and their 16-bit gradient
    most = max(1, budget // min(vocabulary, FEWEST_COLUMNS))
    R = max(1, min(rows, most, budget if given else MOST_ROWS["cpu" if cpu else "other"]))
    C = max(1, min(vocabulary, budget // R))
    if narrow:  # the converted piece of the weight is as large as a block
        C = min(C, max(FEWEST_COLUMNS, (CPU_LOGITS if cpu else GPU_BYTES // 4) // max(1, dim)))
    return R, C if C == vocabulary or C < 64 else C // 64 * 64


@dataclass(frozen=True)
class Dtypes:
    """How a device multiplies: the dtype of operands, and that of the logits it makes of them."""

    operands: torch.dtype
    logits: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Dtypes:
        wide = accumulate(x)
        if x.is_cuda and x.element_size() == 2:
            if torch.cuda.get_device_capability(x.device)[0] >= 8:
                # Products of 16-bit numbers, summed and kept in float32.
                return cls(x.dtype, wide if keeps_sums(x.device) else x.dtype)
            if x.dtype == torch.float16:  # T4: its tensor cores give 16 bits back
                return cls(x.dtype, x.dtype)
        return cls(wide, wide)

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """out = a @ b, where `out` has the dtype of the operands or of the logits."""
        if out.dtype == a.dtype:
            return torch.mm(a, b, out=out)
        if out.dtype == self.logits:
            return torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        return out.copy_(torch.mm(a, b))

    def add_product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out += a @ b, in the dtype of `out` where the device can."""
        if out.dtype == a.dtype:
            out.addmm_(a, b)
        elif out.dtype == self.logits:
            out.add_(torch.mm(a, b, out_dtype=out.dtype))
        else:
            out.add_(torch.mm(a, b))


def _runs(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: Options, rows: ModuleType
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, log-sum-exp) [T].

    Args:
        hidden: [T, D].
        weight: [V, D].
        targets: [T].
        bias: [V] or None.
        options: Of the call.
        rows: The module with `reduce_rows` and `merge`.
    """
    dtypes, (T, D), V = Dtypes.of(hidden), hidden.shape, weight.shape[0]
    R, C = block_shape(T, V, D, options.budget, hidden.device, dtypes.operands != hidden.dtype)
    memory = hidden.new_empty(R * C, dtype=dtypes.logits)
    hidden, wide = hidden.to(dtypes.operands), accumulate(hidden)
    columns = list(_runs(V, C))
    top, total = (hidden.new_empty(len(columns), T, dtype=wide) for _ in range(2))  # [S, T]
    picked = hidden.new_empty(T, dtype=wide)
    for split, of_columns in enumerate(columns):
        piece = weight[of_columns].to(dtypes.operands)  # [C, D]
        offset = None if bias is None else bias[of_columns]
        for r in _runs(T, R):
            block = memory[: (r.stop - r.start) * len(piece)].view(-1, len(piece))  # [R, C]
            dtypes.product(hidden[r], piece.T, block)
            rows.reduce_rows(
                block, offset, targets[r], of_columns.start, options.inner, options.outer, top[split, r],
                total[split, r], picked[r],
            )  # fmt: skip
    return rows.merge(top, total, picked, targets, V, options.ignore_index)


def backward(
    grad: Tensor, lse: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: Options,
    needs: list[bool], rows: ModuleType,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias; an empty tensor for each that is not needed.

    The logits are made again, block by block, and turned into their own gradient in place. The gradient of `hidden` is
    summed over the columns' blocks in one float32 buffer [T, D]; that of a 16-bit weight needs one, [C, D], only where
    the rows do not fit into one block.

    Args:
        grad: [T] gradient of the log-probabilities.
        lse: [T] log-sum-exp that `forward` gave.
        hidden, weight, targets, bias, options: As in `forward`.
        needs: Which of the three gradients are wanted.
        rows: The module with `gradient_rows`.
    """
    dtypes, (T, D), V, wide = Dtypes.of(hidden), hidden.shape, weight.shape[0], accumulate(hidden)
    R, C = block_shape(T, V, D, options.budget, hidden.device, dtypes.operands != hidden.dtype)
    memory = hidden.new_empty(R * C, dtype=dtypes.logits)
    same = dtypes.operands == dtypes.logits
    narrow = memory if same else hidden.new_empty(R * C, dtype=dtypes.operands)
    x = hidden.to(dtypes.operands)
    if needs[1]:  # a NaN in an ignored row, times its gradient of 0, would be NaN in all of the weight's gradient
        x = x.masked_fill((targets == options.ignore_index).unsqueeze(1), 0)
    dhidden = hidden.new_zeros((T, D) if needs[0] else 0, dtype=wide)
    dweight = weight.new_empty((V, D) if needs[1] else 0)
    dbias = weight.new_zeros(V if needs[2] else 0, dtype=wide)
    # One product, rounded once, or a sum of products in float32: straight into its place.
    direct = dweight.dtype == wide or (R >= T and dweight.dtype == dtypes.operands)
    sums = hidden.new_empty((C, D) if needs[1] and not direct else 0, dtype=wide)
    if not T:
        dweight.zero_()
    for of_columns in _runs(V, C) if T else ():
        piece = weight[of_columns].to(dtypes.operands)  # [C, D]
        offset = None if bias is None else bias[of_columns]
        for r in _runs(T, R):
            size = (r.stop - r.start) * len(piece)
            block, dblock = memory[:size].view(-1, len(piece)), narrow[:size].view(-1, len(piece))  # [R, C]
            dtypes.product(x[r], piece.T, block)
            rows.gradient_rows(
                block, offset, targets[r], of_columns.start, options.inner, options.outer, lse[r], grad[r],
                options.ignore_index, dblock,
            )  # fmt: skip
            if needs[0]:
                dtypes.add_product(dblock, piece, dhidden[r])  # [R, C] @ [C, D]
            if needs[1]:
                target = dweight[of_columns] if direct else sums[: len(piece)]
                if r.start:
                    dtypes.add_product(dblock.T, x[r], target)  # [C, R] @ [R, D]
                else:
                    dtypes.product(dblock.T, x[r], target)
            if needs[2]:
                dbias[of_columns] += dblock.sum(0, dtype=wide)
        if needs[1] and not direct:
            dweight[of_columns] = sums[: len(piece)]
    return dhidden.to(hidden.dtype), dweight, dbias if bias is None else dbias.to(bias.dtype)
