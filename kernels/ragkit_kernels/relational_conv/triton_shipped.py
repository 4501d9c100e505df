"""Which compiled forms of the Triton kernels are shipped, for the checks that need no GPU (registers, spills, memory).

The list is recorded from the launchers themselves, so it cannot differ from what they launch.
"""

from __future__ import annotations

import torch

from ragkit_kernels.relational_conv import triton_backend as backend
from ragkit_kernels.relational_conv.layout import build_layout
from ragkit_kernels.triton_tools import Launch, recording

PLAIN = {"weight": False, "keep": False, "shared": True, "dense": False}
"""What GFM-RAG's models need: no edge weights, one relation table for all queries, the boundary as a product."""

FULL = {"weight": True, "keep": True, "shared": False, "dense": True}
"""Every option at once: the most registers. Whatever has fewer options is a part of this code."""

CASES = [
    *(("sum", B, D, PLAIN) for B, D in ((1, 512), (8, 512))),
    *(("sum", B, D, {**FULL, "shared": True}) for B, D in ((1, 128), (4, 512))),
    *(("mean", B, D, FULL) for B, D in ((1, 512), (8, 512))),
    *((aggregate, B, 512, FULL) for aggregate in ("max", "pna") for B in (1, 8)),
]
"""(aggregate, queries, columns, options): each tile of `triton_backend.tile_of` at least once per kind of kernel."""


def shipped_launches(dtype: torch.dtype) -> list[Launch]:
    """What the backend launches, forward and backward, for states of one dtype; nothing is run."""
    with recording() as launches:
        for aggregate, B, D, options in CASES:
            _conv(dtype, aggregate, B, D, **options)
        for D in (512, backend.MAX_NORM):
            h, vector = torch.zeros(2, 8, D, dtype=dtype), torch.zeros(D)
            backend.norm_forward(h, h, vector, vector, 1e-5, h)
            backend.norm_backward(h, h, vector, vector, 1e-5)
        c, w = torch.zeros(8, 512), torch.zeros(512)
        for queries in (8, 1):
            h = torch.zeros(2, queries, 512, dtype=dtype)
            backend.dot_forward(h, c, w)
            backend.dot_backward(torch.zeros(2, 8), h, c, w)
    return launches


def _conv(
    dtype: torch.dtype, aggregate: str, B: int, D: int, weight: bool, keep: bool, shared: bool, dense: bool
) -> None:
    """Forward and backward on a graph with one row long enough to be split, whichever way its edges are sorted."""
    edges = torch.zeros(130, dtype=torch.long)
    layout = build_layout(edges, edges, edges, num_nodes=2, num_relations=2)
    x = torch.zeros(2, B, D, dtype=dtype)
    relation = torch.zeros((2, D) if shared else (B, 2, D), dtype=dtype)
    scale = torch.zeros(len(edges)) if weight else None
    kept = torch.zeros(len(edges), dtype=torch.uint8) if keep else None
    boundary, mask, query = (x, None, None) if dense else (None, torch.zeros(2, B), x[0])
    out = x.new_empty(2, B, D * (4 if aggregate == "pna" else 1))
    won = backend.conv_forward(x, relation, boundary, mask, query, scale, kept, layout, "distmult", aggregate, out)
    backend.conv_backward_x(out, won, x, relation, scale, kept, layout, "distmult", aggregate, x, torch.empty_like(x))
    backend.conv_backward_relation(out, won, x, relation, scale, kept, layout, "distmult", aggregate)
    if weight:
        backend.conv_backward_weight(out, won, x, relation, kept, layout, "distmult", aggregate)
