"""Plain PyTorch reference of relational message passing: the meaning that every faster version must reproduce.

Runs on any device, in any floating dtype (float64 for gradient checks), with gradients by autograd. It materialises
an [E, B, D] message tensor, which the kernels never do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit_kernels.relational_conv.layout import GraphLayout

MESSAGES = ("distmult", "transe")
AGGREGATES = ("sum", "mean", "max", "pna")
PNA_EPS = 1e-6


def relational_conv_reference(
    x: Tensor,
    relation: Tensor,
    layout: GraphLayout,
    *,
    boundary: Tensor | tuple[Tensor, Tensor] | None = None,
    edge_weight: Tensor | None = None,
    edge_mask: Tensor | None = None,
    message: str = "distmult",
    aggregate: str = "sum",
) -> Tensor:
    """See `ragkit_kernels.relational_conv.relational_conv`: the same arguments and result, without its checks."""
    N = layout.num_dst
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    states = x.to(dtype)
    src, rel, _ = layout.by_dst.edges.long()
    degree = layout.by_dst.ptr.diff().long()
    dst = torch.arange(N, device=x.device).repeat_interleave(degree)
    weight = None if edge_weight is None else edge_weight.to(dtype)[layout.order.long()]
    if edge_mask is not None:  # removed edges are as if they were not there
        kept = edge_mask[layout.order.long()].bool()
        src, rel, dst = src[kept], rel[kept], dst[kept]
        weight = None if weight is None else weight[kept]
    table = relation.to(dtype)
    r = table[rel].unsqueeze(1) if table.ndim == 2 else table[:, rel].transpose(0, 1)  # [E, 1 or B, D]
    plain = states[src] * r if message == "distmult" else states[src] + r  # [E, B, D]
    messages = plain if weight is None else plain * weight[:, None, None]
    start = dense_boundary(boundary, x.new_zeros(N, *x.shape[1:])).to(dtype)  # [N, B, D]
    if aggregate == "sum":
        return _sum(messages, dst, start).to(x.dtype)
    count = torch.bincount(dst, minlength=N).to(dtype)[:, None, None] + 1  # [N, 1, 1]; the boundary counts as one
    if aggregate == "mean":
        return (_sum(messages, dst, start) / count).to(x.dtype)
    largest = _largest(messages, dst, start)
    if aggregate == "max":
        return largest.to(x.dtype)
    squares = plain.square() if weight is None else plain.square() * weight[:, None, None]
    mean = _sum(messages, dst, start) / count
    variance = _sum(squares, dst, start.square()) / count - mean.square()
    std = variance.clamp(min=PNA_EPS).sqrt()
    return torch.cat([mean, largest, -_largest(-messages, dst, -start), std], dim=-1).to(x.dtype)


def dense_boundary(boundary: Tensor | tuple[Tensor, Tensor] | None, nothing: Tensor) -> Tensor:
    """The boundary as [N, B, D], whichever way it was given; `nothing` if there is none."""
    if boundary is None:
        return nothing
    if isinstance(boundary, tuple):
        mask, query = boundary
        return mask.to(query.dtype).unsqueeze(-1) * query  # [N, B, 1] * [B, D]
    return boundary


def _sum(messages: Tensor, dst: Tensor, start: Tensor) -> Tensor:
    return start.index_add(0, dst, messages)


def _largest(messages: Tensor, dst: Tensor, start: Tensor) -> Tensor:
    """Largest of the boundary and the messages; of equal ones the boundary, then the first edge, has the gradient."""
    edges = len(dst)
    index = dst[:, None, None].expand_as(messages)
    with torch.no_grad():
        best = start.detach().scatter_reduce(0, index, messages.detach(), "amax")  # [N, B, D]
        position = torch.arange(edges, device=dst.device)[:, None, None].expand_as(messages)
        position = position.masked_fill(messages.detach() != best[dst], edges)
        winner = torch.full_like(best, edges, dtype=torch.long).scatter_reduce(0, index, position, "amin")
        from_edge = (winner < edges) & (best != start.detach())
    if edges == 0:
        return start
    chosen = messages.gather(0, winner.clamp(max=edges - 1))  # [N, B, D]
    return torch.where(from_edge, chosen, start)


def norm_relu_residual_reference(
    h: Tensor, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    """See `ragkit_kernels.relational_conv.norm_relu_residual`: relu(LayerNorm(h)) + x, in float32 inside."""
    dtype = h.dtype if h.dtype in (torch.float32, torch.float64) else torch.float32
    y = h.to(dtype)
    if weight is not None:
        assert bias is not None
        y = torch.nn.functional.layer_norm(y, y.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
    y = y.relu()
    return (y if x is None else y + x.to(dtype)).to(h.dtype)


def relu_dot_reference(h: Tensor, c: Tensor, w: Tensor) -> Tensor:
    """See `ragkit_kernels.relational_conv.relu_dot`: Σ_j relu(h[n, b, j] + c[b, j]) w[j], [N, B]."""
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    return (h.to(dtype) + c.to(dtype)).relu() @ w.to(dtype)
