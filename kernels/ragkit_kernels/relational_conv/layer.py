"""A layer of the graph foundation model on one buffer, without concatenation.

A layer is h = W [x ; u] + b with u = relational_conv(x), then x' = relu(LayerNorm(h)) + x. States and update lie side
by side in Z [N, B, 2 D]: `relational_step` makes the first Z, and `relational_layer` turns Z into the next one: one
matrix product, one pass of LayerNorm + ReLU + residual, one of message passing. Its backward pass adds the residual's
gradient into the product's buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit_kernels.relational_conv import (
    backends,
    layer_ops,  # noqa: F401  registers the ops
)
from ragkit_kernels.relational_conv.epilogue import check_norm
from ragkit_kernels.relational_conv.layout import GraphLayout
from ragkit_kernels.relational_conv.op import Boundary, check, split_boundary
from ragkit_kernels.relational_conv.reference import norm_relu_residual_reference, relational_conv_reference


def relational_step(
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
) -> Tensor:
    """States and their update side by side: Z = [x ; relational_conv(x, relation, layout, ...)].

    Args:
        x: [N, B, D] states with a contiguous last dimension.
        relation, layout, boundary, edge_weight, edge_mask, message, aggregate, backend: As in `relational_conv`;
            aggregate "sum", "mean" or "max".

    Returns:
        Z [N, B, 2 D]: the states `Z[..., :D]` and their update `Z[..., D:]`.

    Raises:
        ValueError: As in `relational_conv`; or a rectangular layout.
    """
    given, mask, query = split_boundary(boundary)
    check(x, relation, layout, given, mask, query, edge_weight, edge_mask, message, aggregate)
    _check_square(layout, aggregate)
    if not backends.use_kernel(backend, x.device, x.dtype):
        update = relational_conv_reference(
            x, relation, layout, boundary=boundary, edge_weight=edge_weight, edge_mask=edge_mask, message=message,
            aggregate=aggregate,
        )  # fmt: skip
        return torch.cat([x, update], dim=-1)
    return torch.ops.ragkit.relational_step(
        x, relation, given, mask, query, edge_weight, edge_mask, layout.flat(), message, aggregate
    )[0]


def relational_layer(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    relation: Tensor | None,
    layout: GraphLayout,
    *,
    residual: bool = True,
    eps: float = 1e-5,
    boundary: Boundary = None,
    edge_weight: Tensor | None = None,
    edge_mask: Tensor | None = None,
    message: str = "distmult",
    aggregate: str = "sum",
    backend: str = "auto",
) -> Tensor:
    """The rest of a layer, and the message passing of the next.

        h  = Z Wᵀ + b
        x' = relu(LayerNorm(h)) + Z[..., :D]
        Z' = [x' ; relational_conv(x', relation, layout, ...)]

    Args:
        z: [N, B, 2 D] contiguous, from `relational_step` or `relational_layer`.
        weight: [D', 2 D] of the layer's matrix product; D' = D unless this is the last layer, without residual.
        bias: [D'], or None.
        norm_weight, norm_bias: [D'] of the LayerNorm; None: no LayerNorm.
        relation: Table of the next layer, [R, D] or [B, R, D]; None: this is the last layer.
        layout, boundary, edge_weight, edge_mask, message, aggregate, backend: Of the next layer's message passing, as
            in `relational_step`.
        residual: Whether the states are added; needs D' = D.
        eps: Added to the variance in the LayerNorm.

    Returns:
        Z' [N, B, 2 D], or x' [N, B, D'] if `relation` is None.

    Raises:
        ValueError: As in `relational_step`, or weights that do not fit z.
    """
    D = z.shape[-1] // 2
    # Only the last layer may put out another size.
    _check_layer(z, weight, norm_weight, norm_bias, residual or relation is not None)
    given, mask, query = split_boundary(boundary)
    if relation is not None:
        check(z[..., :D], relation, layout, given, mask, query, edge_weight, edge_mask, message, aggregate)
        _check_square(layout, aggregate)
    if not backends.use_kernel(backend, z.device, z.dtype):
        h = torch.nn.functional.linear(z, weight, bias)
        x = norm_relu_residual_reference(h, z[..., :D] if residual else None, norm_weight, norm_bias, eps)
        if relation is None:
            return x
        return relational_step(
            x, relation, layout, boundary=boundary, edge_weight=edge_weight, edge_mask=edge_mask, message=message,
            aggregate=aggregate, backend="reference",
        )  # fmt: skip
    return torch.ops.ragkit.relational_layer(
        z, weight, bias, norm_weight, norm_bias, eps, residual, relation, given, mask, query, edge_weight, edge_mask,
        layout.flat(), message, aggregate,
    )[0]  # fmt: skip


def relational_layer_(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    relation: Tensor | None,
    layout: GraphLayout,
    *,
    residual: bool = True,
    eps: float = 1e-5,
    boundary: Boundary = None,
    edge_weight: Tensor | None = None,
    edge_mask: Tensor | None = None,
    message: str = "distmult",
    aggregate: str = "sum",
    backend: str = "auto",
) -> Tensor:
    """`relational_layer` for inference: in place, so that a whole network runs in one buffer.

    The matrix product goes by blocks of rows, whose result is used while it is in the cache; x' takes the place of x,
    and the next update that of the last. Arguments as in `relational_layer`, with D' = D and weights of Z's dtype.

    Returns:
        z itself, or its left half x' (a view) if `relation` is None.

    Raises:
        RuntimeError: Gradients are wanted.
        ValueError: As in `relational_layer`.
    """
    D = z.shape[-1] // 2
    given, mask, query = split_boundary(boundary)
    _check_layer(z, weight, norm_weight, norm_bias, True)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (z, weight, relation, query, given)):
        raise RuntimeError("relational_layer_ has no gradient; use relational_layer")
    if relation is not None:
        check(z[..., :D], relation, layout, given, mask, query, edge_weight, edge_mask, message, aggregate)
        _check_square(layout, aggregate)
    if not backends.use_kernel(backend, z.device, z.dtype):
        out = relational_layer(
            z, weight, bias, norm_weight, norm_bias, relation, layout, residual=residual, eps=eps, boundary=boundary,
            edge_weight=edge_weight, edge_mask=edge_mask, message=message, aggregate=aggregate, backend=backend,
        )  # fmt: skip
        z[..., : out.shape[-1]].copy_(out)
    else:
        torch.ops.ragkit.relational_layer_(
            z, weight, bias, norm_weight, norm_bias, eps, residual, relation, given, mask, query, edge_weight,
            edge_mask, layout.flat(), message, aggregate,
        )  # fmt: skip
    return z[..., :D] if relation is None else z


def _check_layer(
    z: Tensor, weight: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, square: bool
) -> None:
    D = z.shape[-1] // 2
    if z.ndim != 3 or not z.is_contiguous():
        raise ValueError(f"z must be contiguous [N, B, 2 D], found {list(z.shape)} with strides {z.stride()}")
    if weight.ndim != 2 or weight.shape[1] != 2 * D or (square and weight.shape[0] != D):
        raise ValueError(
            f"weight must be [{D if square else 'any'}, {2 * D}] for z {list(z.shape)}, found {list(weight.shape)}"
        )
    check_norm(norm_weight, norm_bias, weight.shape[0])


def _check_square(layout: GraphLayout, aggregate: str) -> None:
    if aggregate == "pna":
        raise ValueError("the fused layer has no 'pna'; use relational_conv")
    if layout.num_dst != layout.num_nodes:
        raise ValueError(f"the fused layer needs as many rows as nodes, found {layout.num_dst} and {layout.num_nodes}")
