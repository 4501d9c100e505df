"""How what a query changes spreads over the background, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from ragkit_kernels.relational_conv import GraphLayout, norm_relu_residual, relational_conv
from torch import Tensor

from ragkit.gfm.active import ActiveRows, active_rows
from ragkit.gfm.layers import RelationalLayer
from ragkit.gfm.settings import GFMSettings

BLOCK_NUMBERS = 1 << 19
"""Numbers of a block of rows that go through a layer together, without gradient on a CPU: 2 MiB of float32."""

MOST_OF_FIRST = 0.3
"""The first layer is computed row by row when it changes less than this share of the rows."""


class Background(NamedTuple):
    """The states of a graph without a query.

    Attributes:
        states: Before each layer [N, D]: zeros, then what the layers before it put out.
        products: For each layer [N, D] its matrix product, before the norm.
        hidden: [N, H] the head's first map of the last states, without the query's half.
        shared: Whether all nodes are alike: the tensors have one row.
    """

    states: list[Tensor]
    products: list[Tensor]
    hidden: Tensor
    shared: bool = False

    def take(self, table: Tensor, node: Tensor) -> Tensor:
        """[M, D] rows of `node` [M]."""
        return table.expand(len(node), -1) if self.shared else F.embedding(node, table)


def changed_states(
    layers: Sequence[RelationalLayer],
    settings: GFMSettings,
    rows: ActiveRows,
    background: Background,
    tables: Sequence[Tensor],
    layout: GraphLayout,
    mask: Tensor,
    query: Tensor,
) -> Tensor:
    """[M, D] states of the active rows after the last of the given layers.

    What differs from the background, `change`, is spread along the edges between active rows alone, and added to the
    background's matrix product: h = h_background + W_x change + W_u (messages of the change). A row that has just been
    reached has no change of its own yet, so W_x is not applied to it.
    """
    seeds, D = rows.counts[0], settings.input_dim
    weight = mask[rows.node[:seeds], rows.query[:seeds]].to(query.dtype)
    start = weight.unsqueeze(1) * F.embedding(rows.query[:seeds], query)  # [S, D] the boundary, elsewhere 0
    learned = [start, *tables, *background.products, *(p for layer in layers for p in layer.parameters())]
    backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned)
    share = None
    if settings.aggregate_func == "mean":
        share = 1 / (layout.by_dst.ptr.diff().to(start.dtype) + 1).unsqueeze(1)[rows.node]  # [M, 1]
    blocks = not backward and start.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    step = max(1, BLOCK_NUMBERS // D) if blocks else len(rows.node)
    x, change, spread = start, start, None
    if blocks:  # one buffer for all layers: fresh memory costs as much as the work
        x, change, spread = (start.new_empty(len(rows.node), D) for _ in range(3))
        x[:seeds], change[:seeds] = start, start
    for number, (layer, table) in enumerate(zip(layers, tables, strict=True), start=1):
        before, count = rows.counts[number - 1], rows.counts[number]
        if settings.message_func == "transe":
            table = torch.zeros_like(table)  # (x + r) − (background + r): the relation cancels
        heard = relational_conv(
            change[:before].unsqueeze(1), table, rows.layout(number, backward), message=settings.message_func,
            out=None if spread is None else spread[:count].unsqueeze(1),
        ).squeeze(1)  # [count, D]  # fmt: skip
        heard[:seeds] += start
        if share is not None:
            heard = heard * share[:count]
        if not blocks:
            x, change = _layer(layer, settings, background, number, rows.node[:count], x, change, heard)
            continue
        for first in range(0, count, step):
            part, known = slice(first, min(first + step, count)), slice(first, min(first + step, max(before, first)))
            x[part], change[part] = _layer(
                layer, settings, background, number, rows.node[part], x[known], change[known], heard[part]
            )
    return x


def _layer(
    layer: RelationalLayer,
    settings: GFMSettings,
    background: Background,
    number: int,
    node: Tensor,
    x: Tensor,
    change: Tensor,
    heard: Tensor,
) -> tuple[Tensor, Tensor]:
    """States of some rows after layer `number`, and how they differ from the background.

    Args:
        node: [n] their nodes.
        x, change: [m, D] states and differences before the layer, of the first m of them; the others are new.
        heard: [n, D] messages of the change.
    """
    known, D = len(change), settings.input_dim
    on_state, on_update = layer.linear.weight.split(D, dim=1)
    h = torch.addmm(background.take(background.products[number - 1], node), heard, on_update.t())  # [n, D]
    if torch.is_autocast_enabled(h.device.type):  # which leaves products in place alone
        h[:known] += F.linear(change, on_state)
    else:
        h[:known].addmm_(change, on_state.t())
    norm, bias = layer.norm()
    residual = None
    if settings.short_cut:
        new = background.take(background.states[number - 1], node[known:])
        residual = torch.cat([x.to(h.dtype), new.to(h.dtype)]).unsqueeze(1)
    x = norm_relu_residual(h.unsqueeze(1), residual, norm, bias, layer.eps).squeeze(1)
    return x, x if number == len(background.products) else x - background.take(background.states[number], node)


def first_states(
    layer: RelationalLayer, settings: GFMSettings, layout: GraphLayout, table: Tensor, mask: Tensor, query: Tensor
) -> Tensor | None:
    """States after the first layer, from the few rows that it computes: all others are one row, relu(LayerNorm(b)).

    Before the first layer only the queries' entities are not zero, so their neighbours alone hear anything.

    Args:
        layer: The first layer.
        settings: The model's settings.
        layout: The graph.
        table: [R, D] the layer's relation table.
        mask: [N, B] how much of the query each node starts with.
        query: [B, D].

    Returns:
        [N, B, D]; None where it does not pay (many entities, hubs) or the settings do not allow it.
    """
    if mask.requires_grad:  # also where it is 0
        return None
    D = settings.input_dim
    silent = settings.message_func == "distmult" and settings.aggregate_func in ("sum", "mean")  # relation ⊙ 0 is 0
    if not silent or layer.linear.out_features != D:
        return None
    N, B = mask.shape
    node, number = mask.nonzero(as_tuple=True)
    rows = active_rows(layout, number, node, B, 1, MOST_OF_FIRST * N * B)
    if rows is None:
        return None
    h = layer.linear.bias.expand(1, 1, D)
    x = norm_relu_residual(h, None, *layer.norm(), layer.eps).view(1, D)
    background = Background([x.new_zeros(1, D)], [h.view(1, D)], x, shared=True)
    changed = changed_states([layer], settings, rows, background, [table], layout, mask, query)
    everywhere = x.view(1, 1, D).to(changed.dtype).expand(N, B, D)
    return everywhere.index_put((rows.node, rows.query), changed)
