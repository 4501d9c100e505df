"""Relational message passing as a PyTorch op: checks, registration, gradients.

`relational_conv` is the op; `torch.library` knows it as `ragkit::relational_conv` with a fake kernel, an autograd
formula and an autocast rule, so it works in `torch.compile(fullgraph=True)` and in mixed precision. The backward pass
gathers like the forward pass, over the edges sorted by source and by relation: no atomics, the same bits in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit_kernels.precision import accumulate
from ragkit_kernels.registration import no_second_derivative, register_autocast
from ragkit_kernels.relational_conv import backends
from ragkit_kernels.relational_conv.layout import GraphLayout, kept_degree
from ragkit_kernels.relational_conv.reference import (
    AGGREGATES,
    MESSAGES,
    PNA_EPS,
    dense_boundary,
    relational_conv_reference,
)

Boundary = Tensor | tuple[Tensor, Tensor] | None


def relational_conv(
    x: Tensor,
    relation: Tensor,
    layout: GraphLayout,
    *,
    boundary: Boundary = None,
    edge_weight: Tensor | None = None,
    edge_mask: Tensor | None = None,
    message: str = "distmult",
    aggregate: str = "sum",
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Sums (or averages, ...) what each node's in-edges carry: one message-passing step of NBFNet and ULTRA.

        message(e)   = w_e · (relation[rel_e] ⊙ x[src_e])       "distmult" (Yang et al. 2015)
                       w_e · (relation[rel_e] + x[src_e])       "transe" (Bordes et al. 2013)
        out[n]       = boundary[n] + Σ_{e: dst_e = n} message(e)                            "sum"
                       the same divided by (number of edges into n) + 1                     "mean"
                       max(boundary[n], the messages)                                       "max"
                       [mean, max, min, std], std² = max(Σ w_e message² / (edges + 1) − mean², 1e-6)    "pna"

    (Zhu et al. 2021, arXiv:2106.06935, section 3.3; PNA: Corso et al. 2020, arXiv:2004.05718; in "pna" the second
    moment takes the unweighted message squared, and the boundary squared.) Messages go from `src` to `dst`; GFM-RAG's
    checkpoints were trained with dst = head and src = tail of `edge_index`, edges doubled with inverse relations.

    Args:
        x: [N, B, D] node states for B queries; any strides with a contiguous last dimension. float32, float16,
            bfloat16 (sums in float32) or float64 (CPU).
        relation: [R, D] table shared by the queries, or [B, R, D]; dtype of `x`.
        layout: The graph, from `build_layout`; on the device of `x`.
        boundary: [num_dst, B, D]; or (mask [num_dst, B], query [B, D]) for their product; None: zeros. It always takes
            part, also in the maximum and as one more edge in the mean.
        edge_weight: [E] in the order the edges were given; None: ones.
        edge_mask: [E] bool, False where an edge is to be treated as absent (also in counts and maxima); None: all.
        message: "distmult" or "transe".
        aggregate: "sum", "mean", "max" or "pna".
        backend: "auto" (Triton on a GPU, numba on a CPU, else plain PyTorch), "kernel", or "reference".
        out: Where the result is written, for inference; in its shape, with a contiguous last dimension. None: a new
            tensor.

    Returns:
        [num_dst, B, D] ([num_dst, B, 4 D] for "pna"), dtype of `x`; gradients for x, relation, boundary, edge_weight.
        Of equal messages, the boundary and then the first edge (by relation, then source) is the maximum and has the
        whole gradient. A NaN message makes a sum NaN and is never a maximum.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, or a tensor whose last dimension is not contiguous
            (it is not copied in silence); the message names the argument.
        RuntimeError: `out` is given and gradients are wanted.
    """
    given, mask, query = split_boundary(boundary)
    check(x, relation, layout, given, mask, query, edge_weight, edge_mask, message, aggregate)
    if out is not None:
        wanted = (layout.num_dst, x.shape[1], x.shape[2] * (4 if aggregate == "pna" else 1))
        shared = out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        if shared and out.numel() and x.numel():  # all empty tensors are at address 0
            raise ValueError("out must not share memory with x: rows that are still to be read would be overwritten")
        if tuple(out.shape) != wanted or out.dtype != x.dtype or out.device != x.device or out.stride(-1) != 1:
            raise ValueError(f"out must be {x.dtype} {list(wanted)} with a contiguous last dimension, like x")
        if torch.is_autocast_enabled(x.device.type):
            raise ValueError("out= is not for autocast, which changes the dtype of x")
        tensors = (x, relation, given, mask, query, edge_weight)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            raise RuntimeError("out= has no gradient; leave it out, or use torch.no_grad()")
    if not backends.use_kernel(backend, x.device, x.dtype):
        result = relational_conv_reference(
            x, relation, layout, boundary=boundary, edge_weight=edge_weight, edge_mask=edge_mask, message=message,
            aggregate=aggregate,
        )  # fmt: skip
        return result if out is None else out.copy_(result)
    if out is not None:
        torch.ops.ragkit.relational_conv_out(
            out, x, relation, given, mask, query, edge_weight, edge_mask, layout.flat(), message, aggregate
        )
        return out
    return torch.ops.ragkit.relational_conv(
        x, relation, given, mask, query, edge_weight, edge_mask, layout.flat(), message, aggregate
    )[0]


def split_boundary(boundary: Boundary) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dense boundary, mask, query), of which one kind is None."""
    return (None, *boundary) if isinstance(boundary, tuple) else (boundary, None, None)


def check(
    x: Tensor, relation: Tensor, layout: GraphLayout, boundary: Tensor | None, mask: Tensor | None,
    query: Tensor | None, edge_weight: Tensor | None, edge_mask: Tensor | None, message: str, aggregate: str,
) -> None:  # fmt: skip
    """Raises ValueError for anything that does not fit, naming the argument."""
    if not x.is_floating_point():
        raise ValueError(f"x must hold floating-point numbers, found {x.dtype}")
    if x.ndim != 3 or x.shape[0] != layout.num_nodes:
        raise ValueError(f"x must be [N, B, D] with N = {layout.num_nodes} nodes, found {list(x.shape)}")
    N, (B, D), R = layout.num_dst, x.shape[1:], layout.num_relations
    if tuple(relation.shape) not in {(R, D), (B, R, D)}:
        raise ValueError(
            f"relation must be [{R}, {D}] or [{B}, {R}, {D}] for this graph, found {list(relation.shape)}"
        )
    wanted = {
        "boundary": (boundary, (N, B, D)),
        "boundary mask": (mask, (N, B)),
        "boundary query": (query, (B, D)),
        "edge_weight": (edge_weight, (layout.num_edges,)),
        "edge_mask": (edge_mask, (layout.num_edges,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, found {list(tensor.shape)}")
    if edge_mask is not None and edge_mask.dtype != torch.bool:
        raise ValueError(f"edge_mask must be bool, found {edge_mask.dtype}")
    for name, value, known in (("message", message, MESSAGES), ("aggregate", aggregate, AGGREGATES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; found {value!r}")
    tensors = {"x": x, "relation": relation, **{name: tensor for name, (tensor, _) in wanted.items()}}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != layout.device:
            raise ValueError(
                f"{name} is on {tensor.device}, the graph's layout on {layout.device}; use layout.to(...)"
            )
        if tensor.ndim > 1 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1 and name != "boundary mask":
            raise ValueError(f"the last dimension of {name} must be contiguous (strides {tensor.stride()})")
    autocast = torch.is_autocast_enabled(x.device.type)
    for name, tensor in (("relation", relation), ("boundary", boundary), ("boundary query", query)):
        if tensor is not None and tensor.dtype != x.dtype and not autocast:
            raise ValueError(f"{name} is {tensor.dtype}, x is {x.dtype}; they must be equal")


@torch.library.custom_op("ragkit::relational_conv", mutates_args=())
def _conv(
    x: Tensor,
    relation: Tensor,
    boundary: Tensor | None,
    mask: Tensor | None,
    query: Tensor | None,
    edge_weight: Tensor | None,
    edge_mask: Tensor | None,
    layout: list[Tensor],
    message: str,
    aggregate: str,
) -> tuple[Tensor, Tensor]:
    graph = GraphLayout.from_flat(layout)
    out = x.new_empty((graph.num_dst, x.shape[1], x.shape[2] * (4 if aggregate == "pna" else 1)))
    won = conv_into(out, x, relation, boundary, mask, query, edge_weight, edge_mask, graph, message, aggregate)
    return out, won


def conv_into(
    out: Tensor, x: Tensor, relation: Tensor, boundary: Tensor | None, mask: Tensor | None, query: Tensor | None,
    edge_weight: Tensor | None, edge_mask: Tensor | None, graph: GraphLayout, message: str, aggregate: str,
) -> Tensor:  # fmt: skip
    """Runs the backend's forward kernel into `out` (any strides with a contiguous last dimension)."""
    weight, keep = by_position(graph, edge_weight, edge_mask)
    if mask is not None and query is not None:
        mask = mask.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    backend = backends.module(x.device)
    if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16):  # numba has no 16-bit floats
        wide = out.new_empty(out.shape, dtype=torch.float32)
        narrow = (x, relation, boundary, mask, query, weight)
        won = backend.conv_forward(*(widen(t) for t in narrow), keep, graph, message, aggregate, wide)
        out.copy_(wide)
        return won
    return backend.conv_forward(
        x, relation, boundary, mask, query, None if weight is None else weight.to(accumulate(x)), keep, graph,
        message, aggregate, out,
    )  # fmt: skip


def widen(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def by_position(
    graph: GraphLayout, edge_weight: Tensor | None, edge_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Edge weights and mask (as uint8) in `by_dst` order."""
    weight = None if edge_weight is None else edge_weight.detach()[graph.order]
    keep = None if edge_mask is None else edge_mask[graph.order].to(torch.uint8)
    return weight, keep


@torch.library.custom_op("ragkit::relational_conv_out", mutates_args=("out",))
def _conv_out(
    out: Tensor,
    x: Tensor,
    relation: Tensor,
    boundary: Tensor | None,
    mask: Tensor | None,
    query: Tensor | None,
    edge_weight: Tensor | None,
    edge_mask: Tensor | None,
    layout: list[Tensor],
    message: str,
    aggregate: str,
) -> None:
    graph = GraphLayout.from_flat(layout)
    conv_into(out, x, relation, boundary, mask, query, edge_weight, edge_mask, graph, message, aggregate)


@_conv_out.register_fake
def _(out, x, relation, boundary, mask, query, edge_weight, edge_mask, layout, message, aggregate):
    return None


@_conv.register_fake
def _(x, relation, boundary, mask, query, edge_weight, edge_mask, layout, message, aggregate):
    N, B, D = layout[0].shape[0] - 1, x.shape[1], x.shape[2]
    shape = {"max": (N, B, D), "pna": (2, N, B, D)}.get(aggregate, (0,))
    won = x.new_empty(shape, dtype=torch.int32)
    return x.new_empty(N, B, D * (4 if aggregate == "pna" else 1)), won


@torch.library.custom_op("ragkit::relational_conv_backward", mutates_args=())
def conv_backward(
    grad: Tensor,
    won: Tensor,
    x: Tensor,
    relation: Tensor,
    edge_weight: Tensor | None,
    edge_mask: Tensor | None,
    layout: list[Tensor],
    message: str,
    aggregate: str,
    base: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (plus `base`), relation and edge_weight; an empty tensor for each that is not needed.

    `grad` is what each node passes back to its messages, as `passed_back` prepares it.
    """
    graph = GraphLayout.from_flat(layout)
    weight, keep = by_position(graph, edge_weight, edge_mask)
    backend = backends.module(x.device)
    dtypes = x.dtype, relation.dtype, x.dtype if edge_weight is None else edge_weight.dtype
    wide = torch.float32 if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16) else None
    if wide is not None:
        grad, x, relation = grad.float(), x.float(), relation.float()
        base = widen(base)
    weight = None if weight is None else weight.to(accumulate(x))
    dx, drelation, dweight = (x.new_empty(0) for _ in range(3))
    if needs[0]:
        dx = x.new_empty(x.shape)
        backend.conv_backward_x(grad, won, x, relation, weight, keep, graph, message, aggregate, base, dx)
    if needs[1]:
        drelation = backend.conv_backward_relation(grad, won, x, relation, weight, keep, graph, message, aggregate)
    if needs[2]:
        sorted_ = backend.conv_backward_weight(grad, won, x, relation, keep, graph, message, aggregate)
        dweight = torch.empty_like(sorted_)
        dweight[graph.order] = sorted_  # a permutation: each place is written once
    return dx.to(dtypes[0]), drelation.to(dtypes[1]), dweight.to(dtypes[2])


@conv_backward.register_fake
def _(grad, won, x, relation, edge_weight, edge_mask, layout, message, aggregate, base, needs):
    weight_dtype = x.dtype if edge_weight is None else edge_weight.dtype
    return (
        x.new_empty(x.shape if needs[0] else 0),
        relation.new_empty(relation.shape if needs[1] else 0),
        x.new_empty(layout[12].shape[0] if needs[2] else 0, dtype=weight_dtype),
    )


conv_backward.register_autograd(no_second_derivative)


def passed_back(
    grad: Tensor, out: Tensor, won: Tensor, start: Tensor | None, edge_mask: Tensor | None, graph: GraphLayout,
    aggregate: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What each node passes back to its messages (see the backends), and to its boundary.

    Args:
        grad: Gradient of the op's output.
        out, won: What the forward pass returned ("pna" needs `out`, "max" and "pna" `won`).
        start: [N, B, D] boundary, for "pna".
    """
    grad = unit_stride(grad)
    if aggregate == "sum":
        return grad, grad
    if aggregate == "max":
        return grad, grad.masked_fill(won >= 0, 0)
    _, keep = by_position(graph, None, edge_mask)
    count = kept_degree(graph, keep).to(grad.dtype)[:, None, None] + 1  # [N, 1, 1]
    if aggregate == "mean":
        scaled = grad / count
        return scaled, scaled
    D, wide = grad.shape[-1] // 4, accumulate(grad)
    dmean, dmax, dmin, dstd = grad.to(wide).unflatten(-1, (4, D)).unbind(-2)  # [N, B, D] each
    mean, _, _, std = out.to(wide).unflatten(-1, (4, D)).unbind(-2)
    count = count.to(wide)
    margin = 1e-5 + 4 * torch.finfo(out.dtype).eps * (out.dtype != wide)  # a clamped value is stored rounded
    dvariance = torch.where(std.square() > PNA_EPS * (1 + margin), dstd / (2 * std), 0)
    dsum = (dmean - 2 * mean * dvariance) / count
    dsquares = dvariance / count
    dstart = dsum + dmax.masked_fill(won[0] >= 0, 0) + dmin.masked_fill(won[1] >= 0, 0)
    if start is not None:
        dstart = dstart + 2 * start * dsquares
    return torch.cat([dsum, dmax, dmin, dsquares], -1).to(grad.dtype), dstart.to(grad.dtype)


def unit_stride(grad: Tensor) -> Tensor:
    """The gradient with a contiguous last dimension (autograd also sends expanded ones)."""
    return grad if grad.stride(-1) == 1 or grad.shape[-1] == 1 else grad.contiguous()


def boundary_gradients(
    dstart: Tensor, mask: Tensor | None, query: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (boundary, mask, query) from that of the dense boundary."""
    dmask = dquery = None
    if mask is not None and query is not None:
        if needs[1]:
            dmask = torch.einsum("nbd,bd->nb", dstart, query).to(mask.dtype)
        if needs[2]:
            dquery = torch.einsum("nb,nbd->bd", mask.to(dstart.dtype), dstart)
    return dstart if needs[0] else None, dmask, dquery


def _setup(ctx, inputs, output):
    x, relation, boundary, mask, query, edge_weight, edge_mask, layout, message, aggregate = inputs
    out, won = output
    ctx.mark_non_differentiable(won)
    pna = aggregate == "pna"
    ctx.save_for_backward(
        x, relation, boundary if pna else None, mask, query, edge_weight, edge_mask, out if pna else None, won, *layout
    )
    ctx.message, ctx.aggregate = message, aggregate


def _backward(ctx, grad, _):
    x, relation, boundary, mask, query, edge_weight, edge_mask, out, won, *layout = ctx.saved_tensors
    graph = GraphLayout.from_flat(layout)
    given = boundary if boundary is not None else (mask, query) if mask is not None else None
    start = dense_boundary(given, x.new_empty(0)) if ctx.aggregate == "pna" and given is not None else None
    passed, dstart = passed_back(grad, out, won, start, edge_mask, graph, ctx.aggregate)
    needs = ctx.needs_input_grad
    dx, drelation, dweight = conv_backward(
        passed, won, x, relation, edge_weight, edge_mask, layout, ctx.message, ctx.aggregate, None,
        [needs[0], needs[1], needs[5]],
    )  # fmt: skip
    first = boundary_gradients(dstart, mask, query, needs[2:5])
    grads = (dx if needs[0] else None, drelation if needs[1] else None, *first, dweight if needs[5] else None)
    return *grads, None, [None] * len(layout), None, None


_conv.register_autograd(_backward, setup_context=_setup)


register_autocast("relational_conv", floats=(0, 1, 2, 4))
