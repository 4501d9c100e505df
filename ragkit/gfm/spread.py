"""How what a query changes spreads over the background, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from ragkit_kernels.relational_conv import GraphLayout, backends, norm_relu_residual, relational_conv
from ragkit_kernels.relational_conv.epilogue import norm_backward
from torch import Tensor
from torch.autograd.function import once_differentiable

from ragkit.gfm.active import ActiveRows, active_rows
from ragkit.gfm.layers import RelationalLayer
from ragkit.gfm.settings import GFMSettings

BLOCK_NUMBERS = 1 << 19
"""Numbers of a block of rows that go through a layer together on a CPU: 2 MiB of float32."""

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
    seeds = rows.counts[0]
    weight = mask[rows.node[:seeds], rows.query[:seeds]].to(query.dtype)
    start = weight.unsqueeze(1) * F.embedding(rows.query[:seeds], query)  # [S, D] the boundary, elsewhere 0
    share = None
    if settings.aggregate_func == "mean":
        share = 1 / (layout.by_dst.ptr.diff().to(start.dtype) + 1).unsqueeze(1)[rows.node]  # [M, 1]
    learned = [start, *tables, *background.products, *(p for layer in layers for p in layer.parameters())]
    backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned)
    wide = start.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    if wide and start.device.type == "cpu" and backends.use_kernel("auto", start.device):
        place = backends.module(start.device).places(rows.node, rows.query, *mask.shape)
        walk = _Walk(list(layers), settings, rows, background.shared, layout, place, share)
        if not backward:
            return walk.forward(start, background, tables, None)
        inputs: list[Tensor | None] = [*tables, *background.states[: len(layers)], *background.products]
        inputs += [part for layer in layers for part in (layer.linear.weight, *layer.norm())]
        return _Spread.apply(walk, start, background.hidden, *inputs)
    x, change = start, start
    for number, (layer, table) in enumerate(zip(layers, tables, strict=True), start=1):
        count = rows.counts[number]
        if settings.message_func == "transe":
            table = torch.zeros_like(table)  # (x + r) − (background + r): the relation cancels
        heard = relational_conv(
            change.unsqueeze(1), table, rows.layout(number, backward), message=settings.message_func
        ).squeeze(1)  # [count, D]
        heard[:seeds] += start
        if share is not None:
            heard = heard * share[:count]
        x, change, _ = _layer(layer, settings, background, number, rows.node[:count], x, change, heard)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """States of some rows after layer `number`, how they differ from the background, and the matrix product.

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
    return x, x if number == len(background.products) else x - background.take(background.states[number], node), h


@dataclass(frozen=True)
class _Walk:
    """What `_Spread` needs beside tensors with gradient; see `changed_states`."""

    layers: list[RelationalLayer]
    settings: GFMSettings
    rows: ActiveRows
    shared: bool
    layout: GraphLayout
    place: Tensor
    share: Tensor | None

    def forward(
        self, start: Tensor, background: Background, tables: Sequence[Tensor], kept: list[Tensor] | None
    ) -> Tensor:
        """The states, block by block of rows; `kept` gets what the backward pass reads of each layer."""
        rows, backend = self.rows, backends.module(start.device)
        seeds, D = start.shape
        x = start.new_empty(len(rows.node), D)  # one buffer for all layers: fresh memory costs as much as the work
        x[:seeds] = start
        change, spread = start, None
        if kept is None:
            change, spread = torch.empty_like(x), torch.empty_like(x)
            change[:seeds] = start
        step = max(1, BLOCK_NUMBERS // D)
        for number, (layer, table) in enumerate(zip(self.layers, tables, strict=True), start=1):
            before, count = rows.counts[number - 1], rows.counts[number]
            heard = start.new_empty(count, D) if spread is None else spread[:count]
            backend.sum_rows(
                self.layout.by_dst, rows.node, rows.query, self.place, before, change, self._factor(table), heard
            )
            heard[:seeds] += start
            if self.share is not None:
                heard *= self.share[:count]
            last = number == len(self.layers)
            after = change if kept is None or last else start.new_empty(count, D)
            product = None if kept is None else start.new_empty(count, D)
            for first in range(0, count, step):
                part, known = (
                    slice(first, min(first + step, count)),
                    slice(first, min(first + step, max(before, first))),
                )
                x[part], difference, h = _layer(
                    layer, self.settings, background, number, rows.node[part], x[known], change[known], heard[part]
                )
                if not last:
                    after[part] = difference
                if product is not None:
                    product[part] = h
            if kept is not None and product is not None:
                kept += [change, heard, product]
            change = after
        return x

    def _factor(self, table: Tensor) -> Tensor | None:
        """What a message is multiplied with; of TransE's (x + r) − (background + r) only x − background is left."""
        return table.contiguous() if self.settings.message_func == "distmult" else None

    def to_background(self, out: Tensor, first: int, last: int, grad: Tensor, sign: int) -> None:
        """Adds gradients of rows first ... last - 1 to those of their nodes' background."""
        if self.shared:
            out += sign * grad.sum(0)
        else:
            backends.module(out.device).add_to_nodes(out, self.place, first, last, grad, sign)


class _Spread(torch.autograd.Function):
    """`changed_states` on a CPU in one piece: no sorted copies of edges, nothing held that is not read again.

    With c, p the rows after and before a layer, h = product[node] + change W_xᵀ + heard W_uᵀ, x' = relu(norm(h)) + x,
    change' = x' − background[node]; a gradient of change is one of x, and with the other sign one of the background.
    """

    @staticmethod
    def forward(ctx: Any, walk: _Walk, start: Tensor, hidden: Tensor, *inputs: Tensor | None) -> Tensor:
        L = len(walk.layers)
        tables, states, products = (list(inputs[i * L : (i + 1) * L]) for i in range(3))
        kept: list[Tensor] = []
        background = Background(states, products, hidden, walk.shared)  # type: ignore[arg-type]
        x = walk.forward(start, background, tables, kept)  # type: ignore[arg-type]
        ctx.walk, ctx.nodes = walk, [len(state) for state in states]  # type: ignore[arg-type]
        ctx.save_for_backward(*tables, *inputs[3 * L :], *kept)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        walk, saved = ctx.walk, ctx.saved_tensors
        L, D, counts, layout = len(walk.layers), grad.shape[1], walk.rows.counts, walk.layout
        tables, weights, kept = saved[:L], saved[L : 4 * L], saved[4 * L :]
        backend, rows, wanted = backends.module(grad.device), walk.rows, ctx.needs_input_grad[3:]
        dtables: list[Tensor | None] = [None] * L
        dstates, dproducts = ([grad.new_zeros(nodes, D) for nodes in ctx.nodes] for _ in range(2))
        dweights: list[Tensor | None] = [None] * (3 * L)
        dstart = grad.new_zeros(counts[0], D)
        dx = grad.contiguous()
        for i in range(L - 1, -1, -1):
            before, count = counts[i], counts[i + 1]
            weight, *norm = weights[3 * i : 3 * i + 3]
            change, heard, h = kept[3 * i : 3 * i + 3]
            dh, *dnorm = norm_backward(dx.unsqueeze(1), h.unsqueeze(1), *norm, walk.layers[i].eps)
            dh = dh.squeeze(1)  # [count, 1, D] -> [count, D]
            walk.to_background(dproducts[i], 0, count, dh, 1)
            dweights[3 * i] = torch.cat([dh[:before].t() @ change[:before], dh.t() @ heard], dim=1)
            if norm[0] is not None:
                dweights[3 * i + 1 : 3 * i + 3] = dnorm
            dchange, dheard = dh[:before] @ weight[:, :D], dh @ weight[:, D:]
            if walk.share is not None:
                dheard *= walk.share[:count]
            dstart += dheard[: counts[0]]
            factor = walk._factor(tables[i])
            backend.sum_rows(
                layout.by_src, rows.node, rows.query, walk.place, count, dheard, factor, dchange, add=True
            )
            if factor is not None and wanted[i]:
                dtables[i] = backend.relation_gradient(layout, walk.place, before, count, change, dheard)
            if i:
                walk.to_background(dstates[i], 0, before, dchange, -1)
            if walk.settings.short_cut:
                walk.to_background(dstates[i], before, count, dx[before:], 1)
                dchange += dx[:before]
            dx = dchange
        dstart += dx
        return None, dstart, None, *dtables, *dstates, *dproducts, *dweights


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
