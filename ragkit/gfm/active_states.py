"""Logits by active rows: the background once, and for each query only the rows that it changes.

Exact: sums are linear, so what a query changes spreads along the edges between its active rows alone, on top of the
background's sums and matrix products; both paths agree to rounding. Which of them is faster depends on the graph and
is decided by counting rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from ragkit_kernels.relational_conv import (
    GraphLayout,
    norm_relu_residual,
    relational_step,
    relu_dot,
)
from torch import Tensor, nn

from ragkit.gfm.active import ActiveRows, active_rows
from ragkit.gfm.entity_model import EntityModel
from ragkit.gfm.spread import Background, changed_states

ROWS_AT_ONCE = 4096  # rows whose states are picked together for the head, without gradient
PAYS_BELOW = 0.6
"""Active rows are used when they are fewer than this share of the dense path's rows."""


def supported(model: EntityModel) -> bool:
    """Whether a model's settings allow active rows: sums or means, equal sizes, a head of two maps."""
    s = model.settings
    same = all(dim == s.input_dim for dim in s.hidden_dims)
    return same and s.aggregate_func in ("sum", "mean") and not s.concat_hidden and s.num_mlp_layer == 2


def background_bytes(model: EntityModel, nodes: int) -> int:
    """Memory of a background."""
    s = model.settings
    return nodes * s.input_dim * 2 * (s.num_layers + 1) * next(model.parameters()).element_size()


def choose_rows(
    model: EntityModel, layout: GraphLayout, mask: Tensor, background_kept: bool = False, most: float | None = None
) -> ActiveRows | None:
    """The active rows of a batch, or None where the dense path has less to compute.

    Args:
        model: The entity model.
        layout: The graph.
        mask: [N, B] how much of the query each node starts with.
        background_kept: Whether the background costs nothing (inference); else it counts as one more query.
        most: Rows over all layers from which on the answer is None; None: what makes active rows pay.
    """
    N, B = mask.shape
    layers = model.settings.num_layers
    if most is None:
        most = PAYS_BELOW * N * B * layers - (0 if background_kept else N * layers)
    if most <= 0 or not supported(model):
        return None
    node, query = mask.nonzero(as_tuple=True)
    return active_rows(layout, query, node, B, layers, most)


def compute_background(model: EntityModel, layout: GraphLayout, tables: list[Tensor]) -> Background:
    """The background of a graph: all layers with an empty boundary, once for all queries."""
    settings = model.settings
    x = tables[0].new_zeros(layout.num_nodes, settings.input_dim)
    states, products = [x], []
    layers: Any = list(model.layers)
    for layer, table in zip(layers, tables, strict=True):
        z = relational_step(
            x.unsqueeze(1), table, layout, message=settings.message_func, aggregate=settings.aggregate_func
        )  # [N, 1, 2 D]
        h = layer.linear(z)  # [N, 1, D]
        weight, bias = layer.norm()
        residual = z[..., : settings.input_dim] if settings.short_cut else None
        x = norm_relu_residual(h, residual, weight, bias, layer.eps).squeeze(1)
        products.append(h.squeeze(1))
        states.append(x)
    return Background(states[:-1], products, F.linear(x, head_parts(model)[0]))


def head_parts(model: EntityModel) -> tuple[Tensor, Tensor, nn.Linear, nn.Linear]:
    """(the head's weights on the state [H, D], on the query [H, D], its first map, its last map)."""
    first, last = (step for step in model.mlp if isinstance(step, nn.Linear))
    on_state, on_query = first.weight.split(model.settings.input_dim, dim=1)
    return on_state, on_query, first, last


def active_logits(
    model: EntityModel,
    rows: ActiveRows,
    background: Background,
    tables: list[Tensor],
    layout: GraphLayout,
    mask: Tensor,
    query: Tensor,
) -> Tensor:
    """Logits of all nodes for B queries.

    Args:
        model: The entity model.
        rows: The rows to compute, from `choose_rows`.
        background: From `compute_background` with the same graph and tables.
        tables: A relation table [R, D] for each layer.
        layout: The graph.
        mask: [N, B] how much of the query each node starts with.
        query: [B, D].

    Returns:
        [N, B] float32 (float64 for a float64 model).
    """
    _, on_query, first, last = head_parts(model)
    c = F.linear(query, on_query, first.bias)  # [B, H]
    scores = relu_dot(background.hidden.unsqueeze(1), c, last.weight[0]) + last.bias  # [N, 1, H], [B, H] -> [N, B]
    layers: Any = list(model.layers)
    x = changed_states(layers, model.settings, rows, background, tables, layout, mask, query)  # [M, D]
    for b in range(len(query)):
        mine = (rows.query == b).nonzero().squeeze(1)
        parts = [mine] if x.requires_grad else mine.split(ROWS_AT_ONCE)
        changed = [model.score(x[part].unsqueeze(1), query[b : b + 1]).squeeze(1) for part in parts]  # [M_b] in all
        node = rows.node[mine]
        scores = scores.index_put((node, torch.full_like(node, b)), torch.cat(changed))
    return scores
