"""One layer of relational message passing, with GFM-RAG v1's parameters and names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from ragkit_kernels.relational_conv import (
    GraphLayout,
    norm_relu_residual,
    relational_conv,
    relational_layer,
    relational_layer_,
    relational_step,
)
from ragkit_kernels.relational_conv.layout import kept_degree
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ragkit.gfm.settings import GFMSettings

PNA_WIDTH = 13  # the state, and 4 aggregators × 3 scalers
MIN_SCALE = 1e-2


class RelationalLayer(nn.Module):
    """x' = relu(LayerNorm(W [x ; u] + b)) + x, where u joins the messages of the edges into a node.

    Zhu et al. 2021 (arXiv:2106.06935), with the relation table P = MLP(R0) of ULTRA (Galkin et al. 2023,
    arXiv:2310.04562). `W[:, :D]` multiplies the state x, the rest the update u.

    Args:
        settings: The model's settings.
        input_dim: Numbers of a state that comes in.
        output_dim: Numbers of a state that goes out.
    """

    def __init__(self, settings: GFMSettings, input_dim: int, output_dim: int) -> None:
        super().__init__()
        width = PNA_WIDTH if settings.aggregate_func == "pna" else 2
        self.linear = nn.Linear(width * input_dim, output_dim)
        self.layer_norm = nn.LayerNorm(output_dim) if settings.layer_norm else None
        self.relation_projection = nn.Sequential(
            nn.Linear(settings.input_dim, input_dim), nn.ReLU(), nn.Linear(input_dim, input_dim)
        )

    def norm(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of the LayerNorm, or (None, None)."""
        return (None, None) if self.layer_norm is None else (self.layer_norm.weight, self.layer_norm.bias)

    @property
    def eps(self) -> float:
        """Added to the variance in the LayerNorm."""
        return 1e-5 if self.layer_norm is None else self.layer_norm.eps


def propagate(
    layers: list[RelationalLayer],
    settings: GFMSettings,
    layout: GraphLayout,
    tables: list[Tensor],
    mask: Tensor,
    query: Tensor,
    edge_weights: list[Tensor | None],
    edge_mask: Tensor | None,
    start: Tensor | None = None,
    in_place: bool = False,
    recompute: bool = False,
) -> Iterator[Tensor]:
    """States after each layer, one by one, so that who needs the last alone does not hold the others.

    x_0 = mask ⊗ query is the boundary condition: it starts the states, and is added to the messages in every layer.
    A layer's matrix product and what follows, and the message passing of the next layer, are one op, which writes
    [x ; u] side by side, so that nothing is concatenated.

    Args:
        layers: L layers.
        settings: The model's settings.
        layout: The graph.
        tables: L relation tables [R, D].
        mask: [N, B] how much of the query each node starts with.
        query: [B, D].
        edge_weights: L times [E], or None for ones.
        edge_mask: [E] bool, False for edges that are as if they were not there; or None.
        start: [N, B, D] the states that come in; None: x_0.
        in_place: Without gradient: all layers work in one buffer, so a state holds only until the next is asked for.
        recompute: With gradient: nothing of a layer is held but the states that come in, and the backward pass runs it
            anew (gradient checkpointing).

    Yields:
        L tensors [N, B, D] (the last [N, B, hidden_dims[-1]]); views, whose last dimension is contiguous.
    """
    if settings.aggregate_func == "pna" or (recompute and torch.is_grad_enabled()):
        yield from _one_by_one(
            layers, settings, layout, tables, mask, query, edge_weights, edge_mask, start, recompute
        )
        return
    x = mask.to(query.dtype).unsqueeze(-1) * query if start is None else start  # [N, B, 1] * [B, D] -> [N, B, D]
    D = x.shape[-1]
    kinds: dict[str, Any] = {"message": settings.message_func, "aggregate": settings.aggregate_func}
    steps: list[dict[str, Any]] = [
        {"boundary": (mask, query), "edge_weight": weight, "edge_mask": edge_mask, **kinds} for weight in edge_weights
    ]
    z = relational_step(x, tables[0], layout, **steps[0])  # [N, B, 2D]
    for number, layer in enumerate(layers, start=1):
        last, same = number == len(layers), layer.linear.out_features == D
        run = relational_layer_ if in_place and same else relational_layer
        z = run(
            z, layer.linear.weight, layer.linear.bias, *layer.norm(), None if last else tables[number], layout,
            residual=settings.short_cut and same, eps=layer.eps,
            **({} if last else steps[number]),
        )  # fmt: skip
        yield z if last else z[..., :D]


def _one_by_one(
    layers: list[RelationalLayer],
    settings: GFMSettings,
    layout: GraphLayout,
    tables: list[Tensor],
    mask: Tensor,
    query: Tensor,
    edge_weights: list[Tensor | None],
    edge_mask: Tensor | None,
    start: Tensor | None,
    recompute: bool,
) -> Iterator[Tensor]:
    """`propagate` layer by layer, so that each can be run anew: on ops that read what they saved only once."""
    x = mask.to(query.dtype).unsqueeze(-1) * query if start is None else start  # [N, B, D]
    pna = settings.aggregate_func == "pna"
    scalers = pna_scalers(layout, edge_mask).to(query.dtype) if pna else None

    def run(
        layer: RelationalLayer, x: Tensor, table: Tensor, mask: Tensor, query: Tensor, weight: Tensor | None
    ) -> Tensor:
        update = relational_conv(
            x, table, layout, boundary=(mask, query), edge_weight=weight, edge_mask=edge_mask,
            message=settings.message_func, aggregate=settings.aggregate_func,
        )  # [N, B, D], or [N, B, 4D] for pna  # fmt: skip
        if scalers is None:
            h = layer.linear(torch.cat([x.to(update.dtype), update], dim=-1))
        else:
            h = pna_linear(layer.linear, x, update, scalers)
        residual = x.to(h.dtype) if settings.short_cut and h.shape[-1] == x.shape[-1] else None
        return norm_relu_residual(h, residual, *layer.norm(), layer.eps)

    for layer, table, weight in zip(layers, tables, edge_weights, strict=True):
        if recompute and torch.is_grad_enabled():  # no layer draws random numbers, so no state of theirs is kept
            x = checkpoint(run, layer, x, table, mask, query, weight, use_reentrant=False, preserve_rng_state=False)
        else:
            x = run(layer, x, table, mask, query, weight)
        yield x


def pna_scalers(layout: GraphLayout, edge_mask: Tensor | None) -> Tensor:
    """[N, 3] factors 1, s and 1 / max(s, 0.01), with s = log(edges into the node + 1) over its mean on all nodes.

    Corso et al. 2020 (arXiv:2004.05718). Where no node has an edge, s is 0.
    """
    keep = None if edge_mask is None else edge_mask[layout.order.long()]
    logs = (kept_degree(layout, keep) + 1).double().log()
    scale = logs / logs.mean().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.stack([torch.ones_like(scale), scale, 1 / scale.clamp(min=MIN_SCALE)], dim=1)


def pna_linear(linear: nn.Linear, x: Tensor, planes: Tensor, scalers: Tensor) -> Tensor:
    """The layer's matrix product on [x ; each aggregate under each scaler], without making that 13 D wide vector.

    A scaler s is one number for a node, so W (s f) = s (W f): one product of the four aggregates with the weights of
    the three scalers side by side, then three scaled sums. v1 orders the columns after x by (d, aggregator, scaler).

    Args:
        linear: Its weight is [D', 13 D].
        x: [N, B, D].
        planes: [N, B, 4 D], mean, max, min and std one after the other.
        scalers: [N, 3].

    Returns:
        [N, B, D'].
    """
    D = x.shape[-1]
    wide = linear.weight[:, D:].unflatten(1, (D, 4, 3))  # [D', D, 4, 3]
    wide = wide.permute(3, 0, 2, 1).reshape(-1, 4 * D)  # [3 D', 4 D], aggregator before d as in `planes`
    parts = F.linear(planes, wide).unflatten(-1, (3, linear.out_features))  # [N, B, 3, D']
    scaled = (parts * scalers[:, None, :, None].to(parts.dtype)).sum(2)  # [N, B, D']
    return F.linear(x, linear.weight[:, :D], linear.bias) + scaled.to(parts.dtype)
