"""Triton backend: hands tensors on a GPU to the kernels of triton_conv.py, triton_select.py and triton_epilogue.py.

The functions and their meaning are those of cpu_backend.py. Storage is float32, float16 or bfloat16; sums are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ragkit_kernels.relational_conv import triton_conv, triton_epilogue, triton_select
from ragkit_kernels.relational_conv.layout import GraphLayout, Segments, kept_degree
from ragkit_kernels.triton_tools import launch

__all__ = [
    "conv_backward_relation",
    "conv_backward_weight",
    "conv_backward_x",
    "conv_forward",
    "dot_backward",
    "dot_forward",
    "norm_backward",
    "norm_forward",
]
PARTS = {"sum": (1, 0), "mean": (1, 0), "max": (1, 1), "pna": (4, 2)}
"""Planes of partial sums, and of partial winners, that a slice of a heavy row leaves behind."""

MAX_NORM = 4096  # columns that a program can hold for LayerNorm
STRIPS = 1024  # most programs that sum gradients of shared vectors; fixed, so that the bits do not depend on the GPU


def tile_of(B: int, D: int, aggregate: str) -> dict[str, int]:
    """Edges, queries and columns of a program's tile, and how many tiles its loop keeps in flight.

    The tile has 2048 elements, 16 float32 registers of each thread per running sum; half of it for PNA, which has six.
    """
    if B == 1 and D > 128:
        lanes, block_b, block_d = 4, 1, 512
    elif aggregate in ("max", "pna") or 1 < B <= 4:
        lanes, block_b, block_d = 4, 4, 128
    else:
        lanes, block_b, block_d = (16, 1, 128) if B == 1 else (4, 8, 64)
    return {"LANES": lanes // (1 + (aggregate == "pna")), "BLOCK_B": block_b, "BLOCK_D": block_d, "STAGES": 3}


def registers_of(x: Tensor, aggregate: str, plain: bool) -> int:
    """Most registers per thread: few for what most models run, enough elsewhere that nothing spills."""
    narrow = x.element_size() == 2
    if plain and aggregate == "sum":
        return 96 if narrow else 128
    return 168 if narrow else 232


def _grid(first: int, B: int, D: int, tile: dict[str, int]) -> tuple[int, int, int]:
    return first, -(-D // tile["BLOCK_D"]), -(-B // tile["BLOCK_B"])


def _strided(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A tensor [rows, B, ...] with its strides per row and query."""
    return (None, 0, 0) if tensor is None else (tensor, tensor.stride(0), tensor.stride(1))


def _table(relation: Tensor) -> tuple[Tensor, int, int]:
    """The relation table with its strides per relation and query (0: shared)."""
    if relation.ndim == 2:
        return relation, relation.stride(0), 0
    return relation, relation.stride(1), relation.stride(0)


def _storage(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"GPU kernels take float32, float16 or bfloat16, found {x.dtype}; use backend='reference'")


def _gather(
    segments: Segments, a: tuple, c: tuple, weight: Tensor | None, keep: Tensor | None, degree: Tensor | None,
    boundary: tuple, out: Tensor, won: Tensor | None, queries: int, tile: dict[str, int], **kind: Any,
) -> None:  # fmt: skip
    """`gather_kernel` over all units, then `combine_kernel` over the heavy rows. queries: those of `a`."""
    B, D = out.shape[1], a[0].shape[-1]
    rows = len(segments.ptr) - 1
    aggregate = kind["AGGREGATE"]
    plain = weight is None and keep is None and kind["SHARED"]
    planes, winners = PARTS[aggregate]
    part, part_won = _parts(segments, planes, B, D, out), _parts(segments, winners, B, D, out, torch.int32)
    target = (*boundary, *_strided(out), won)
    grid = _grid(len(segments.units), queries, D, tile)
    launch(
        triton_conv.gather_kernel, grid[:2] + (1,) if kind["REDUCE"] else grid,
        segments.units, segments.ptr, segments.edges, segments.edges.shape[1], *a, *c, weight, keep, degree, *target,
        part, part_won, rows, segments.slots, queries, D, max_registers=registers_of(a[0], aggregate, plain), **kind,
        **tile,
    )  # fmt: skip
    if part is not None:
        _combine(segments, degree, target, part, part_won, B, D, aggregate, tile)


def _combine(
    segments: Segments, degree: Tensor | None, target: tuple, part: Tensor, part_won: Tensor | None, B: int, D: int,
    aggregate: str, tile: dict[str, int],
) -> None:  # fmt: skip
    launch(
        triton_conv.combine_kernel, _grid(len(segments.heavy), B, D, tile),
        segments.heavy, segments.ptr, degree, *target, part, part_won, len(segments.ptr) - 1, segments.slots, B, D,
        max_registers=168 if aggregate == "pna" else 128, AGGREGATE=aggregate, **tile,
    )  # fmt: skip


def _parts(
    segments: Segments, planes: int, B: int, D: int, like: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """[planes, slots, B, D] partial results of the heavy rows, or None if there are none."""
    if not planes or not len(segments.heavy):
        return None
    return like.new_empty(planes, segments.slots, B, D, dtype=dtype)


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
    """Writes the update of every node into `out` and returns the winning edges; see cpu_backend.py."""
    _storage(x)
    B, D = x.shape[1:]
    N = layout.num_dst
    planes = {"max": (N, B, D), "pna": (2, N, B, D)}.get(aggregate, (0,))
    won = x.new_empty(planes, dtype=torch.int32)
    degree = None if keep is None or aggregate in ("sum", "max") else kept_degree(layout, keep)
    start = (*_strided(boundary), *_strided(mask), query, 0 if query is None else query.stride(0))
    _gather(
        layout.by_dst, _strided(x), _table(relation), weight, keep, degree, start, out, won if len(won) else None, B,
        tile_of(B, D, aggregate), MESSAGE=message, AGGREGATE=aggregate, SHARED=relation.ndim == 2, REDUCE=False,
    )  # fmt: skip
    return won


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
    """out = base + the gradient of the states; see cpu_backend.py."""
    _storage(x)
    B, D = x.shape[1:]
    shared = relation.ndim == 2
    start = (*_strided(base), None, 0, 0, None, 0)
    if aggregate in ("sum", "mean"):  # the forward kernel on the transposed graph
        code = "distmult" if message == "distmult" else "copy"
        _gather(
            layout.by_src, _strided(grad), _table(relation), weight, keep, None, start, out, None, B,
            tile_of(B, D, "sum"), MESSAGE=code, AGGREGATE="sum", SHARED=shared, REDUCE=False,
        )  # fmt: skip
        return
    _select(layout.by_src, layout, grad, won, x, relation, weight, keep, start, out, message, aggregate, False)


def _select(
    segments: Segments, layout: GraphLayout, grad: Tensor, won: Tensor, x: Tensor, relation: Tensor,
    weight: Tensor | None, keep: Tensor | None, start: tuple, out: Tensor, message: str, aggregate: str,
    of_table: bool,
) -> None:  # fmt: skip
    """`select_kernel` over all units, then `combine_kernel` over the heavy rows."""
    B, D = x.shape[1:]
    shared = relation.ndim == 2
    tile = tile_of(B, D, aggregate)
    part = _parts(segments, 1, out.shape[1], D, out)
    grid = _grid(len(segments.units), B, D, tile)
    launch(
        triton_select.select_kernel, grid[:2] + (1,) if of_table and shared else grid,
        segments.units, segments.ptr, segments.edges, layout.num_edges, layout.by_dst.ptr, *_strided(x),
        *_table(relation), weight, keep, *_strided(grad), won, *start[:3], *_strided(out), part, layout.num_dst,
        segments.slots, B, D, max_registers=registers_of(x, aggregate, False), MESSAGE=message, AGGREGATE=aggregate,
        SHARED=shared, OF_TABLE=of_table, **tile,
    )  # fmt: skip
    if part is not None:
        _combine(segments, None, (*start, *_strided(out), None), part, None, out.shape[1], D, "sum", tile)


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
    """Gradient of the relation table, in its shape and dtype (summed in float32); see cpu_backend.py."""
    _storage(x)
    B, D = x.shape[1:]
    shared = relation.ndim == 2
    out = torch.empty_like(relation, memory_format=torch.contiguous_format)
    rows = out.unsqueeze(1) if shared else out.transpose(0, 1)  # [R, 1 or B, D]
    start = (None, 0, 0, None, 0, 0, None, 0)
    if aggregate in ("sum", "mean"):  # the forward kernel on the edges by relation, with the states as the table
        code = "distmult" if message == "distmult" else "copy"
        _gather(
            layout.by_rel, _strided(grad), _strided(x), weight, keep, None, start, rows, None, B,
            tile_of(B, D, "sum"), MESSAGE=code, AGGREGATE="sum", SHARED=False, REDUCE=shared,
        )  # fmt: skip
        return out
    _select(layout.by_rel, layout, grad, won, x, relation, weight, keep, start, rows, message, aggregate, True)
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
    """[E] float32 gradient of the edge weights, in `by_dst` order; see cpu_backend.py."""
    _storage(x)
    B, D = x.shape[1:]
    tile = tile_of(B, D, aggregate)
    segments = layout.by_dst
    grid = _grid(len(segments.units), B, D, tile)
    sums = x.new_empty(grid[1] * grid[2], layout.num_edges, dtype=torch.float32)  # one per tile of (B, D)
    kind = "sum" if aggregate == "mean" else aggregate
    launch(
        triton_select.weight_kernel, grid,
        segments.units, segments.ptr, segments.edges, layout.num_edges, *_strided(x), *_table(relation), keep,
        *_strided(grad), won, sums, layout.num_dst, B, D,
        max_registers=168, MESSAGE=message, AGGREGATE=kind, SHARED=relation.ndim == 2, **tile,
    )  # fmt: skip
    return sums[0] if len(sums) == 1 else sums.sum(0)


def _norm_tile(D: int) -> tuple[dict[str, int], int]:
    """Rows and columns of a program, and its warps."""
    if D > MAX_NORM:
        raise ValueError(f"the GPU's LayerNorm takes up to {MAX_NORM} columns, found {D}; use backend='reference'")
    block = max(32, 1 << (D - 1).bit_length())
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "BLOCK_D": block}, max(4, block // 512)


def norm_forward(
    h: Tensor, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor
) -> None:
    """out [N, B, D] (strided) = relu(LayerNorm(h)) + x, for contiguous h; without weight there is no LayerNorm."""
    _storage(h)
    N, B, D = h.shape
    tile, warps = _norm_tile(D)
    launch(
        triton_epilogue.norm_kernel, (-(-N * B // tile["ROWS"]),),
        h, *_strided(x), weight, bias, *_strided(out), N * B, B, D, num_warps=warps, EPS=eps, **tile,
    )  # fmt: skip


def norm_backward(
    grad: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dh [N, B, D], dweight [D], dbias [D]) for grad; the last two are float32, 0 without LayerNorm."""
    _storage(h)
    N, B, D = h.shape
    tile, warps = _norm_tile(D)
    dh = torch.empty_like(h)
    strip = max(tile["ROWS"], -(-N * B // STRIPS))
    strips = -(-N * B // strip)
    dweight, dbias = (h.new_empty(strips if weight is not None else 0, D, dtype=torch.float32) for _ in range(2))
    launch(
        triton_epilogue.norm_backward_kernel, (strips,),
        *_strided(grad), h, weight, bias, dh, dweight, dbias, N * B, B, D, strip, num_warps=warps, EPS=eps, **tile,
    )  # fmt: skip
    return dh, dweight.sum(0), dbias.sum(0)


DOT_TILE = {"ROWS": 16, "BLOCK_H": 128, "STAGES": 3}


def _head(h: Tensor) -> tuple[Tensor, int, int]:
    """h with its strides per node and query (0 where the queries share it)."""
    return h, h.stride(0), 0 if h.shape[1] == 1 else h.stride(1)


def dot_forward(h: Tensor, c: Tensor, w: Tensor) -> Tensor:
    """[N, B] float32 = Σ_j relu(h[n, b, j] + c[b, j]) w[j] for h [N, B, H], or [N, 1, H] shared by the queries."""
    _storage(h)
    N, (B, H) = len(h), c.shape
    out = h.new_empty(N, B, dtype=torch.float32)
    grid = (-(-N * B // DOT_TILE["ROWS"]),)
    launch(triton_epilogue.dot_kernel, grid, *_head(h), c, w, out, N * B, B, H, **DOT_TILE)
    return out


def dot_backward(grad: Tensor, h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dh in the shape of h, dc [B, H], dw [H]) for grad [N, B]; the last two float32."""
    _storage(h)
    N, (B, H) = len(h), c.shape
    shared = h.shape[1] < B
    columns = -(-H // DOT_TILE["BLOCK_H"])
    strip = max(DOT_TILE["ROWS"], -(-N * B // STRIPS))
    strips = -(-N // strip)
    dh = h.new_empty(h.shape)
    dc, dw = (h.new_empty(strips, B, H, dtype=torch.float32) for _ in range(2))
    launch(
        triton_epilogue.dot_backward_kernel, (strips, columns, B),
        grad, *_head(h), c, w, None if shared else dh, dc, dw, N, B, H, strip, **DOT_TILE,
    )  # fmt: skip
    if shared:
        grid = (-(-N // DOT_TILE["ROWS"]), columns)
        launch(triton_epilogue.dot_shared_kernel, grid, grad, *_head(h)[:2], c, w, dh, N, B, H, **DOT_TILE)
    return dh, dc.sum(0), dw.sum((0, 1))
