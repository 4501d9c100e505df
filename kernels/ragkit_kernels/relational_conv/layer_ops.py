"""Registration of the fused layer's ops with PyTorch: kernels, shapes, gradients, autocast. See layer.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit_kernels.registration import no_second_derivative, register_autocast
from ragkit_kernels.relational_conv.epilogue import norm_backward, norm_into
from ragkit_kernels.relational_conv.layout import GraphLayout
from ragkit_kernels.relational_conv.op import (
    boundary_gradients,
    conv_backward,
    conv_into,
    passed_back,
    unit_stride,
)

CACHED_NUMBERS = 1 << 19
"""Numbers of a block's matrix product when a layer works in place: 2 MiB of float32."""


@torch.library.custom_op("ragkit::relational_step", mutates_args=())
def _step(
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
    N, B, D = x.shape
    z = x.new_empty((N, B, 2 * D))
    z[..., :D].copy_(x)
    won = conv_into(z[..., D:], x, relation, boundary, mask, query, edge_weight, edge_mask, graph, message, aggregate)
    return z, won


def _fake_won(x: Tensor, width: int, aggregate: str) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], width) if aggregate == "max" else (0,), dtype=torch.int32)


@_step.register_fake
def _(x, relation, boundary, mask, query, edge_weight, edge_mask, layout, message, aggregate):
    N, B, D = x.shape
    return x.new_empty(N, B, 2 * D), _fake_won(x, D, aggregate)


def _step_setup(ctx, inputs, output):
    _, relation, boundary, mask, query, edge_weight, edge_mask, layout, message, aggregate = inputs
    z, won = output
    ctx.mark_non_differentiable(won)
    ctx.save_for_backward(relation, mask, query, edge_weight, edge_mask, z, won, *layout)
    ctx.message, ctx.aggregate = message, aggregate


def _conv_gradients(ctx, grad, saved, needs, need_state):
    """Gradients of x', relation, (boundary, mask, query) and edge_weight from that of Z' = [x' ; update]."""
    relation, mask, query, edge_weight, edge_mask, z, won, *layout = saved
    D = z.shape[-1] // 2
    grad = unit_stride(grad)
    passed, dstart = passed_back(grad[..., D:], z, won, None, edge_mask, GraphLayout.from_flat(layout), ctx.aggregate)
    dstate, drelation, dweight = conv_backward(
        passed, won, z[..., :D], relation, edge_weight, edge_mask, layout, ctx.message, ctx.aggregate, grad[..., :D],
        [need_state, needs[0], needs[4]],
    )  # fmt: skip
    first = boundary_gradients(dstart, mask, query, needs[1:4])
    return dstate, drelation if needs[0] else None, *first, dweight if needs[4] else None


def _step_grad(ctx, grad, _):
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad
    dx, *others = _conv_gradients(ctx, grad, saved, needs[1:6], needs[0])
    return dx if needs[0] else None, *others, None, [None] * (len(saved) - 7), None, None


_step.register_autograd(_step_grad, setup_context=_step_setup)
register_autocast("relational_step", floats=(0, 1, 2, 4))


@torch.library.custom_op("ragkit::relational_layer", mutates_args=())
def _layer(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    residual: bool,
    relation: Tensor | None,
    boundary: Tensor | None,
    mask: Tensor | None,
    query: Tensor | None,
    edge_weight: Tensor | None,
    edge_mask: Tensor | None,
    layout: list[Tensor],
    message: str,
    aggregate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(Z' or x', h [N, B, D'], winners)."""
    N, B, width = z.shape
    D, rows = width // 2, z.view(N * B, width)
    h = z.new_empty((N, B, len(weight)))
    product = h.view(N * B, len(weight))
    if bias is None:
        torch.mm(rows, weight.t(), out=product)
    else:
        torch.addmm(bias, rows, weight.t(), out=product)
    before = z[..., :D] if residual else None
    if relation is None:
        x = z.new_empty(h.shape)
        norm_into(x, h, before, norm_weight, norm_bias, eps)
        return x, h, z.new_empty(0, dtype=torch.int32)
    graph = GraphLayout.from_flat(layout)
    out = z.new_empty((N, B, 2 * len(weight)))
    x, update = out[..., : len(weight)], out[..., len(weight) :]
    norm_into(x, h, before, norm_weight, norm_bias, eps)
    won = conv_into(update, x, relation, boundary, mask, query, edge_weight, edge_mask, graph, message, aggregate)
    return out, h, won


@torch.library.custom_op("ragkit::relational_layer_", mutates_args=("z",))
def _layer_in_place(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    residual: bool,
    relation: Tensor | None,
    boundary: Tensor | None,
    mask: Tensor | None,
    query: Tensor | None,
    edge_weight: Tensor | None,
    edge_mask: Tensor | None,
    layout: list[Tensor],
    message: str,
    aggregate: str,
) -> None:
    N, B, width = z.shape
    D = width // 2
    states, update = z[..., :D], z[..., D:]
    step = N if z.device.type != "cpu" else max(1, CACHED_NUMBERS // max(1, B * D))
    for first in range(0, N, step):
        rows = z[first : first + step]
        h = torch.nn.functional.linear(rows, weight, bias)  # [n, B, 2 D] -> [n, B, D]
        x = rows[..., :D]
        norm_into(x, h, x if residual else None, norm_weight, norm_bias, eps)
    if relation is not None:
        graph = GraphLayout.from_flat(layout)
        conv_into(update, states, relation, boundary, mask, query, edge_weight, edge_mask, graph, message, aggregate)


@_layer_in_place.register_fake
def _(
    z, weight, bias, norm_weight, norm_bias, eps, residual, relation, boundary, mask, query, edge_weight, edge_mask,
    layout, message, aggregate,
):  # fmt: skip
    return None


@_layer.register_fake
def _(
    z, weight, bias, norm_weight, norm_bias, eps, residual, relation, boundary, mask, query, edge_weight, edge_mask,
    layout, message, aggregate,
):  # fmt: skip
    N, B, out = z.shape[0], z.shape[1], weight.shape[0]
    won = _fake_won(z, out, aggregate if relation is not None else "sum")
    return z.new_empty(N, B, out if relation is None else 2 * out), z.new_empty(N, B, out), won


@torch.library.custom_op("ragkit::relational_layer_product_backward", mutates_args=())
def _product_backward(
    dh: Tensor, z: Tensor, weight: Tensor, residual: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z (with the residual's added to its left half), weight and bias; empty where not needed."""
    N, B, width = z.shape
    flat = dh.view(N * B, len(weight))
    dz, dweight, dbias = (z.new_empty(0) for _ in range(3))
    if needs[0]:
        dz = z.new_empty(z.shape)
        torch.mm(flat, weight, out=dz.view(N * B, width))
        if residual is not None:
            dz[..., : width // 2] += residual
    if needs[1]:
        dweight = flat.t() @ z.view(N * B, width)
    if needs[2]:
        dbias = flat.sum(0)
    return dz, dweight, dbias


@_product_backward.register_fake
def _(dh, z, weight, residual, needs):
    return (
        z.new_empty(z.shape if needs[0] else 0),
        z.new_empty(weight.shape if needs[1] else 0),
        z.new_empty(weight.shape[0] if needs[2] else 0),
    )


_product_backward.register_autograd(no_second_derivative)


def _layer_setup(ctx, inputs, output):
    z, weight, _, norm_weight, norm_bias, ctx.eps, ctx.residual, relation, _, mask, query, *rest = inputs
    edge_weight, edge_mask, layout, ctx.message, ctx.aggregate = rest
    out, h, won = output
    ctx.mark_non_differentiable(h, won)
    states = None if relation is None else out
    ctx.save_for_backward(
        z, weight, norm_weight, norm_bias, h, relation, mask, query, edge_weight, edge_mask, states, won, *layout
    )


def _layer_grad(ctx, grad, _h, _won):
    z, weight, norm_weight, norm_bias, h, *saved = ctx.saved_tensors
    needs, count = ctx.needs_input_grad, len(ctx.saved_tensors) - 12
    wanted = any(needs[:5])
    if saved[0] is None:
        dstate, others = unit_stride(grad), (None,) * 5
    else:
        conv_needs = (needs[7], needs[8], needs[9], needs[10], needs[11])
        dstate, *others = _conv_gradients(ctx, grad, saved, conv_needs, wanted)
    dz = dweight = dbias = dnorm_weight = dnorm_bias = None
    if wanted:
        dh, dnorm_weight, dnorm_bias = norm_backward(dstate, h, norm_weight, norm_bias, ctx.eps)
        dz, dweight, dbias = _product_backward(dh, z, weight, dstate if ctx.residual else None, list(needs[:3]))
    return (
        *(dz if needs[0] else None, dweight if needs[1] else None, dbias if needs[2] else None),
        *(dnorm_weight if needs[3] else None, dnorm_bias if needs[4] else None, None, None),
        *others,
        *(None, [None] * count, None, None),
    )


_layer.register_autograd(_layer_grad, setup_context=_layer_setup)
register_autocast("relational_layer", floats=(0, 1, 2, 7, 8, 10))
register_autocast("relational_layer_", floats=(1, 2, 7, 8, 10))
