"""The rest of a GFM layer as fused ops: LayerNorm + ReLU + residual, the no-concat step, and the scoring head.

A layer of the graph foundation model is h = W [x ; u] + b with u = relational_conv(x), then
x' = relu(LayerNorm(h)) + x. `relational_step` ends one layer and begins the next: it writes x' and the next u side by
side into one buffer Z [N, B, 2D], so the next matrix product reads Z and nothing is concatenated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit_kernels.memory import new_empty
from ragkit_kernels.relational_conv import backends
from ragkit_kernels.relational_conv.layout import GraphLayout
from ragkit_kernels.relational_conv.op import (
    Boundary,
    boundary_gradients,
    check,
    conv_backward,
    conv_into,
    no_second_derivative,
    passed_back,
    register_autocast,
    split_boundary,
    unit_stride,
)
from ragkit_kernels.relational_conv.reference import (
    norm_relu_residual_reference,
    relational_conv_reference,
    relu_dot_reference,
)

NARROW = (torch.float16, torch.bfloat16)


def norm_relu_residual(
    h: Tensor,
    x: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """relu(LayerNorm(h)) + x in one pass over the rows, statistics in float32.

    Args:
        h: [N, B, D] contiguous.
        x: [N, B, D] residual with a contiguous last dimension, or None.
        weight, bias: [D] of the LayerNorm; None: no LayerNorm.
        eps: Added to the variance.
        backend: As in `relational_conv`.

    Returns:
        [N, B, D], dtype of `h`; gradients for all four tensors.
    """
    if h.ndim != 3 or (x is not None and x.shape != h.shape):
        raise ValueError(
            f"h and x must both be [N, B, D], found {list(h.shape)}, {None if x is None else list(x.shape)}"
        )
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias of the LayerNorm come together")
    if not backends.use_kernel(backend, h.device):
        return norm_relu_residual_reference(h, x, weight, bias, eps)
    return torch.ops.ragkit.norm_relu_residual(h, x, weight, bias, eps)


@torch.library.custom_op("ragkit::norm_relu_residual", mutates_args=())
def _norm(h: Tensor, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    out = new_empty(h, h.shape)
    _norm_into(out, h, x, weight, bias, eps)
    return out


def _norm_into(
    out: Tensor, h: Tensor, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    backend = backends.module(h.device)
    h = h.contiguous()
    if h.device.type == "cpu" and h.dtype in NARROW:  # numba has no 16-bit floats
        wide = torch.empty(out.shape)
        backend.norm_forward(h.float(), *(None if t is None else t.float() for t in (x, weight, bias)), eps, wide)
        out.copy_(wide)
        return
    if h.device.type == "cpu" and weight is not None and bias is not None:
        weight, bias = weight.to(h.dtype), bias.to(h.dtype)
    backend.norm_forward(h, x, weight, bias, eps, out)


@_norm.register_fake
def _(h, x, weight, bias, eps):
    return torch.empty_like(h, memory_format=torch.contiguous_format)


@torch.library.custom_op("ragkit::norm_relu_residual_backward", mutates_args=())
def norm_backward(
    grad: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, weight and bias (the last two are zeros without LayerNorm)."""
    backend = backends.module(h.device)
    h = h.contiguous()
    dtype, kind = h.dtype, torch.float32 if weight is None else weight.dtype
    if h.device.type == "cpu":
        wide = torch.float32 if dtype in NARROW else dtype
        grad, h = grad.to(wide), h.to(wide)
        weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    dh, dweight, dbias = backend.norm_backward(grad, h, weight, bias, eps)
    return dh.to(dtype), dweight.to(kind), dbias.to(kind)


@norm_backward.register_fake
def _(grad, h, weight, bias, eps):
    kind = torch.float32 if weight is None else weight.dtype
    D = h.shape[-1]
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    return dh, h.new_empty(D, dtype=kind), h.new_empty(D, dtype=kind)


norm_backward.register_autograd(no_second_derivative)


def _norm_setup(ctx, inputs, output):
    h, x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(h, weight, bias)


def _norm_grad(ctx, grad):
    h, weight, bias = ctx.saved_tensors
    grad = unit_stride(grad)
    needs = ctx.needs_input_grad
    if not (needs[0] or needs[2] or needs[3]):
        return None, grad, None, None, None
    dh, dweight, dbias = norm_backward(grad, h, weight, bias, ctx.eps)
    return dh, grad if needs[1] else None, dweight if needs[2] else None, dbias if needs[3] else None, None


_norm.register_autograd(_norm_grad, setup_context=_norm_setup)


def relational_step(
    h: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    relation: Tensor,
    layout: GraphLayout,
    *,
    eps: float = 1e-5,
    boundary: Boundary = None,
    edge_weight: Tensor | None = None,
    edge_mask: Tensor | None = None,
    message: str = "distmult",
    aggregate: str = "sum",
    backend: str = "auto",
) -> Tensor:
    """The end of one layer and the message passing of the next, in one buffer.

        x' = relu(LayerNorm(h)) + x        (x' = x where h is None: the first layer)
        Z  = [x' ; relational_conv(x', relation, layout, ...)]

    Args:
        h: [N, B, D] result of the layer's matrix product, or None.
        x: [N, B, D] residual with a contiguous last dimension, or None (needs h).
        weight, bias: [D] of the LayerNorm, or None.
        relation, layout, boundary, edge_weight, edge_mask, message, aggregate, backend: As in `relational_conv`;
            aggregate "sum", "mean" or "max".

    Returns:
        Z [num_dst, B, 2 D]: the states `Z[..., :D]` and their update `Z[..., D:]`.

    Raises:
        ValueError: As in `relational_conv`; or neither h nor x; or a rectangular layout with h.
    """
    state = h if h is not None else x
    if state is None:
        raise ValueError("relational_step needs h, x or both")
    if aggregate == "pna":
        raise ValueError("relational_step has no 'pna'; use relational_conv")
    if layout.num_dst > layout.num_nodes:
        raise ValueError(f"relational_step cannot write {layout.num_dst} rows from {layout.num_nodes} states")
    if h is not None and layout.num_dst != layout.num_nodes:
        raise ValueError("a rectangular layout takes x alone, without h")
    given, mask, query = split_boundary(boundary)
    check(state, relation, layout, given, mask, query, edge_weight, edge_mask, message, aggregate)
    if x is not None and h is not None and x.shape != h.shape:
        raise ValueError(f"h and x must both be [N, B, D], found {list(h.shape)} and {list(x.shape)}")
    if not backends.use_kernel(backend, state.device):
        new = state if h is None else norm_relu_residual_reference(h, x, weight, bias, eps)
        update = relational_conv_reference(
            new, relation, layout, boundary=boundary, edge_weight=edge_weight, edge_mask=edge_mask, message=message,
            aggregate=aggregate,
        )  # fmt: skip
        return torch.cat([new[: layout.num_dst], update], dim=-1)
    return torch.ops.ragkit.relational_step(
        h, x, weight, bias, eps, relation, given, mask, query, edge_weight, edge_mask, layout.flat(), message,
        aggregate,
    )[0]  # fmt: skip


@torch.library.custom_op("ragkit::relational_step", mutates_args=())
def _step(
    h: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
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
    state = h if h is not None else x
    assert state is not None
    D = state.shape[2]
    z = new_empty(state, (graph.num_dst, state.shape[1], 2 * D))
    left, right = z[..., :D], z[..., D:]
    if h is not None:
        _norm_into(left, h, x, weight, bias, eps)
        states = left
    else:
        left.copy_(state[: graph.num_dst])
        states = state
    won = conv_into(right, states, relation, boundary, mask, query, edge_weight, edge_mask, graph, message, aggregate)
    return z, won


@_step.register_fake
def _(h, x, weight, bias, eps, relation, boundary, mask, query, edge_weight, edge_mask, layout, message, aggregate):
    state = h if h is not None else x
    N, B, D = layout[0].shape[0] - 1, state.shape[1], state.shape[2]
    won = state.new_empty((N, B, D) if aggregate == "max" else (0,), dtype=torch.int32)
    return state.new_empty(N, B, 2 * D), won


def _step_setup(ctx, inputs, output):
    h, x, weight, bias, ctx.eps, relation, boundary, mask, query, edge_weight, edge_mask, layout, message, agg = inputs
    z, won = output
    ctx.mark_non_differentiable(won)
    whole = x if h is None else None  # a rectangular layout reads more rows than z holds
    ctx.save_for_backward(h, weight, bias, relation, mask, query, edge_weight, edge_mask, z, won, whole, *layout)
    ctx.message, ctx.aggregate = message, agg


def _step_grad(ctx, grad, _):
    h, weight, bias, relation, mask, query, edge_weight, edge_mask, z, won, whole, *layout = ctx.saved_tensors
    graph = GraphLayout.from_flat(layout)
    needs = ctx.needs_input_grad
    D = z.shape[-1] // 2
    grad = unit_stride(grad)
    direct, dupdate = grad[..., :D], grad[..., D:]
    passed, dstart = passed_back(dupdate, z, won, None, edge_mask, graph, ctx.aggregate)
    square = graph.num_dst == graph.num_nodes
    states = z[..., :D] if whole is None else whole
    need_state = any(needs[:4])
    dstate, drelation, dweight_edge = conv_backward(
        passed, won, states, relation, edge_weight, edge_mask, layout, ctx.message, ctx.aggregate,
        direct if square else None, [need_state, needs[5], needs[9]],
    )  # fmt: skip
    if need_state and not square:
        dstate[: graph.num_dst] += direct
    dh = dweight = dbias = None
    if h is not None and (needs[0] or needs[2] or needs[3]):
        dh, dweight, dbias = norm_backward(dstate, h, weight, bias, ctx.eps)
        dweight, dbias = dweight if needs[2] else None, dbias if needs[3] else None
    first = boundary_gradients(dstart, mask, query, needs[6:9])
    return (
        *(dh, dstate if needs[1] else None, dweight, dbias, None, drelation if needs[5] else None),
        *first,
        *(dweight_edge if needs[9] else None, None, [None] * len(layout), None, None),
    )


_step.register_autograd(_step_grad, setup_context=_step_setup)
register_autocast("relational_step", floats=(0, 1, 5, 6, 8))


def relu_dot(h: Tensor, c: Tensor, w: Tensor, backend: str = "auto") -> Tensor:
    """The scoring head after its matrix product: Σ_j relu(h[n, b, j] + c[b, j]) w[j], nothing concatenated or stored.

    With mlp([x ; q]) = w2 · relu(W_x x + W_q q + b), `h` is W_x x and `c` is W_q q + b, once per query.

    Args:
        h: [N, B, H], contiguous in H; or [N, 1, H], shared by the queries.
        c: [B, H].
        w: [H].
        backend: As in `relational_conv`.

    Returns:
        [N, B] scores, float32 (float64 for float64).
    """
    fits = h.ndim == 3 and c.ndim == 2 and h.shape[1] in (1, len(c)) and h.shape[2] == c.shape[1]
    if not fits or w.shape != h.shape[2:]:
        raise ValueError(
            f"h must be [N, B or 1, H], c [B, H], w [H]; found {list(h.shape)}, {list(c.shape)}, {list(w.shape)}"
        )
    if not backends.use_kernel(backend, h.device):
        return relu_dot_reference(h, c, w)
    return torch.ops.ragkit.relu_dot(h, c, w)


@torch.library.custom_op("ragkit::relu_dot", mutates_args=())
def _dot(h: Tensor, c: Tensor, w: Tensor) -> Tensor:
    return backends.module(h.device).dot_forward(*_same(h, c, w))


def _same(h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One dtype for all three; on the CPU at least float32."""
    wide = torch.float32 if h.device.type == "cpu" and h.dtype in NARROW else h.dtype
    small = torch.float64 if wide == torch.float64 else torch.float32
    return unit_stride(h.to(wide)), c.to(small).contiguous(), w.to(small).contiguous()


@_dot.register_fake
def _(h, c, w):
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    return h.new_empty(h.shape[0], c.shape[0], dtype=dtype)


@torch.library.custom_op("ragkit::relu_dot_backward", mutates_args=())
def _dot_backward(grad: Tensor, h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dh, dc, dw = backends.module(h.device).dot_backward(grad.contiguous(), *_same(h, c, w))
    return dh.to(h.dtype), dc.to(c.dtype), dw.to(w.dtype)


@_dot_backward.register_fake
def _(grad, h, c, w):
    return h.new_empty(h.shape), torch.empty_like(c), torch.empty_like(w)


_dot_backward.register_autograd(no_second_derivative)


def _dot_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _dot_grad(ctx, grad):
    return _dot_backward(grad, *ctx.saved_tensors)


_dot.register_autograd(_dot_grad, setup_context=_dot_setup)
