"""numba backend: hands tensors to the loops of cpu_conv.py. float32 and float64; op.py converts 16-bit tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ragkit_kernels.numba_tools import flat, launch, optional
from ragkit_kernels.relational_conv import cpu_conv as kernels
from ragkit_kernels.relational_conv.cpu_epilogue import dot_backward, dot_forward, norm_backward, norm_forward
from ragkit_kernels.relational_conv.cpu_rows import add_to_nodes, places, relation_gradient, sum_rows
from ragkit_kernels.relational_conv.layout import GraphLayout, Segments, kept_degree
from ragkit_kernels.relational_conv.reference import PNA_EPS, dense_boundary

__all__ = [
    "add_to_nodes",
    "conv_backward_relation",
    "conv_backward_weight",
    "conv_backward_x",
    "conv_forward",
    "dot_backward",
    "dot_forward",
    "norm_backward",
    "norm_forward",
    "places",
    "relation_gradient",
    "sum_rows",
]
CODES = {"distmult": kernels.MULTIPLY, "transe": kernels.ADD}
KINDS = {"sum": kernels.SUM, "mean": kernels.SUM, "max": kernels.MAX, "pna": kernels.PNA}


def _rows(segments: Segments) -> tuple[np.ndarray, ...]:
    edges = segments.edges.numpy()
    return segments.ptr.numpy(), edges[0], edges[1], edges[2], segments.units.numpy()


def _relation(relation: Tensor) -> tuple[np.ndarray, int, int]:
    """Flat table and its strides per relation and per batch row (0: shared)."""
    if relation.ndim == 2:
        return flat(relation), relation.stride(0), 0
    return flat(relation), relation.stride(1), relation.stride(0)


def _edges(x: Tensor, weight: Tensor | None, keep: Tensor | None) -> tuple:
    """Weights and whether there are any (the filler is 1), mask and whether there is one."""
    scale = torch.ones(1, dtype=x.dtype).numpy() if weight is None else flat(weight)
    return scale, weight is not None, optional(keep, torch.uint8), keep is not None


def _boundary(x: Tensor, boundary: Tensor | None, mask: Tensor | None, query: Tensor | None) -> tuple:
    base = (flat(boundary), boundary.stride(0), boundary.stride(1), True) if boundary is not None else None
    factors = (
        (flat(mask), mask.stride(0), mask.stride(1), flat(query), query.stride(0), True)
        if mask is not None and query is not None
        else None
    )
    none = optional(None, x)
    return (*(base or (none, 0, 0, False)), *(factors or (none, 0, 0, none, 0, False)))


def conv_forward(
    x: Tensor,
    relation: Tensor,
    boundary: Tensor | None,
    mask: Tensor | None,
    query: Tensor | None,
    weight: Tensor | None,
    keep: Tensor | None,
    layout: GraphLayout,
    message: str,
    aggregate: str,
    out: Tensor,
) -> Tensor:
    """Writes the update of every node into `out` and returns what the backward needs to know (see `op.py`).

    Args:
        x: [N, B, D] states.
        relation: [R, D] or [B, R, D].
        boundary: [N, B, D] or None.
        mask, query: [N, B] and [B, D], or None: the boundary as a product.
        weight, keep: [E] in `by_dst` order, or None; keep is uint8.
        out: [N, B, D] ([N, B, 4 D] for "pna").

    Returns:
        The winning edges, int32: empty, [N, B, D] for "max", [2, N, B, D] for "pna" (largest, smallest).
    """
    B, D = x.shape[1:]
    N = layout.num_dst
    rows = _rows(layout.by_dst)
    states = (flat(x), x.stride(0), x.stride(1), *_relation(relation))
    edges = (*_edges(x, weight, keep), CODES[message])
    start = _boundary(x, boundary, mask, query)

    def total(mean: bool, to: Tensor) -> None:
        target = (flat(to), to.stride(0), to.stride(1), B, D)
        launch(kernels.sum_kernel, *rows, *states, *edges, mean, *start, *target)

    def extreme(sign: int, to: Tensor) -> Tensor:
        won = x.new_empty((N, B, D), dtype=torch.int32)
        target = (flat(to), to.stride(0), to.stride(1), flat(won), B, D)
        launch(kernels.max_kernel, *rows, *states, *edges, sign, *start, *target)
        return won

    if aggregate in ("sum", "mean"):
        total(aggregate == "mean", out)
        return torch.empty(0, dtype=torch.int32)
    if aggregate == "max":
        return extreme(1, out)
    planes = out.unflatten(-1, (4, D))  # [N, B, 4, D]: mean, max, min, std
    total(True, planes[:, :, 0])
    won = torch.stack([extreme(1, planes[:, :, 1]), extreme(-1, planes[:, :, 2])])
    given = boundary if boundary is not None else (mask, query) if mask is not None and query is not None else None
    squares = dense_boundary(given, x.new_zeros(N, B, D)).square().contiguous()  # [N, B, D]
    launch(kernels.squares_kernel, *rows, *states, *edges, flat(squares), B, D)
    count = kept_degree(layout, keep).to(x.dtype)[:, None, None] + 1
    variance = squares / count - planes[:, :, 0].square()
    planes[:, :, 3] = variance.clamp(min=PNA_EPS).sqrt()
    return won


def _gradient(grad: Tensor, won: Tensor) -> tuple:
    """Flat gradient with strides, and the winners: one tensor for "max", two for "pna", else a filler."""
    fill = torch.empty(1, dtype=torch.int32)
    first, second = (won[0], won[1]) if won.ndim == 4 else (won, fill) if won.ndim == 3 else (fill, fill)
    return flat(grad), grad.stride(0), grad.stride(1), flat(first), flat(second)


def conv_backward_x(
    grad: Tensor,
    won: Tensor,
    x: Tensor,
    relation: Tensor,
    weight: Tensor | None,
    keep: Tensor | None,
    layout: GraphLayout,
    message: str,
    aggregate: str,
    base: Tensor | None,
    out: Tensor,
) -> None:
    """out = base + the gradient of the states.

    Args:
        grad: What a node's aggregate passes back, prepared by `op.py`: [N, B, D] for the sum of its messages, or for
            the winning message of "max"; [N, B, 4 D] for "pna" (of the sum, the largest, the smallest, the squares).
        won: As `conv_forward` returned it.
        base: [N, B, D] added to the result, or None.
        out: [N, B, D], written.
    """
    B, D = x.shape[1:]
    rows = _rows(layout.by_src)
    edges = _edges(x, weight, keep)
    target = (flat(out), out.stride(0), out.stride(1))
    if aggregate in ("sum", "mean"):  # the forward loop on the transposed graph
        code = kernels.MULTIPLY if message == "distmult" else kernels.COPY
        states = (flat(grad), grad.stride(0), grad.stride(1), *_relation(relation))
        start = _boundary(x, base, None, None)
        launch(kernels.sum_kernel, *rows, *states, *edges, code, False, *start, *target, B, D)
        return
    states = (flat(x), x.stride(0), x.stride(1), *_relation(relation))
    start = _boundary(x, base, None, None)[:4]
    passed = _gradient(grad, won)
    launch(
        kernels.select_dx_kernel, *rows, layout.by_dst.ptr.numpy(), *states, *edges, CODES[message], KINDS[aggregate],
        *passed, *start, *target, B, D,
    )  # fmt: skip


def conv_backward_relation(
    grad: Tensor,
    won: Tensor,
    x: Tensor,
    relation: Tensor,
    weight: Tensor | None,
    keep: Tensor | None,
    layout: GraphLayout,
    message: str,
    aggregate: str,
) -> Tensor:
    """Gradient of the relation table, in its shape; summed over the batch if the table is shared. See above."""
    B, D = x.shape[1:]
    out = x.new_empty(relation.shape)
    rows = _rows(layout.by_rel)
    edges = _edges(x, weight, keep)
    states = (flat(x), x.stride(0), x.stride(1), *_relation(relation))
    launch(
        kernels.drel_kernel, *rows, layout.by_dst.ptr.numpy(), *states, *edges, CODES[message], KINDS[aggregate],
        *_gradient(grad, won), *_relation(out), B, D,
    )  # fmt: skip
    return out


def conv_backward_weight(
    grad: Tensor,
    won: Tensor,
    x: Tensor,
    relation: Tensor,
    keep: Tensor | None,
    layout: GraphLayout,
    message: str,
    aggregate: str,
) -> Tensor:
    """[E] gradient of the edge weights, in `by_dst` order. See above."""
    B, D = x.shape[1:]
    out = torch.empty(layout.num_edges, dtype=x.dtype)
    rows = _rows(layout.by_dst)
    states = (flat(x), x.stride(0), x.stride(1), *_relation(relation))
    launch(
        kernels.dweight_kernel, *rows, *states, *_edges(x, None, keep)[2:], CODES[message], KINDS[aggregate],
        *_gradient(grad, won), flat(out), B, D,
    )  # fmt: skip
    return out
