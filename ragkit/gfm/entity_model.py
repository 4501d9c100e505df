"""The entity model: a stack of message-passing layers and the head that scores every node for every query."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from ragkit_kernels.relational_conv import GraphLayout, relu_dot
from torch import Tensor, nn

from ragkit.gfm.layers import RelationalLayer, propagate
from ragkit.gfm.settings import GFMSettings
from ragkit.gfm.spread import first_states

CHUNK_NUMBERS = 1 << 22  # numbers of the head's hidden layer that exist at once, without gradient: 16 MiB of float32

EdgeWeight = Tensor | Sequence[Tensor | None] | None


class EntityModel(nn.Module):
    """NBFNet conditioned on a query vector (`QueryNBFNet` and `EntityNBFNet` of GFM-RAG v1).

    Inside, states are [N, B, D], node first, so that a node's row for all queries is one contiguous piece.

    Args:
        settings: Sizes and kinds.

    Attributes:
        recompute: Whether a layer is run anew in the backward pass, instead of holding what it computed.
    """

    def __init__(self, settings: GFMSettings) -> None:
        super().__init__()
        self.settings = settings
        self.recompute = False
        dims = [settings.input_dim, *settings.hidden_dims]
        self.layers = nn.ModuleList(
            RelationalLayer(settings, before, after) for before, after in zip(dims[:-1], dims[1:], strict=True)
        )
        width = settings.state_dim + settings.input_dim
        steps: list[nn.Module] = []
        for _ in range(settings.num_mlp_layer - 1):
            steps += [nn.Linear(width, width), nn.ReLU()]
        self.mlp = nn.Sequential(*steps, nn.Linear(width, 1))

    def states(
        self,
        layout: GraphLayout,
        tables: list[Tensor],
        mask: Tensor,
        query: Tensor,
        edge_weight: EdgeWeight = None,
        edge_mask: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """States of all nodes after the last layer.

        Args:
            layout: The graph; messages go from its sources to its destinations.
            tables: A relation table [R, D] for each layer.
            mask: [N, B] how much of the query each node starts with.
            query: [B, D].
            edge_weight: None (ones), [E] for all layers, or one of them for each layer; with gradient.
            edge_mask: [E] bool, False for edges that are as if they were not there; None: all are there.

        Returns:
            [N, B, D]; with concat_hidden a list with the states after each layer.
        """
        weights = self.edge_weights(edge_weight)
        layers: list[RelationalLayer] = list(self.layers)  # type: ignore[arg-type]
        done: list[Tensor] = []
        if len(layers) > 1 and weights[0] is None and edge_mask is None:
            first = first_states(layers[0], self.settings, layout, tables[0], mask, query)
            done = [] if first is None else [first]
        skip = len(done)
        rest = propagate(
            layers[skip:],
            self.settings,
            layout,
            tables[skip:],
            mask,
            query,
            weights[skip:],
            edge_mask,
            start=done[0] if done else None,
            in_place=not self.settings.concat_hidden and not torch.is_grad_enabled(),
            recompute=self.recompute,
        )
        states = chain(done, rest)
        return list(states) if self.settings.concat_hidden else deque(states, maxlen=1)[0]

    def edge_weights(self, edge_weight: EdgeWeight) -> list[Tensor | None]:
        """One weight tensor (or None) for each layer.

        Raises:
            ValueError: There is another number of them than of layers.
        """
        count = self.settings.num_layers
        if edge_weight is None or isinstance(edge_weight, Tensor):
            return [edge_weight] * count
        if len(edge_weight) != count:
            raise ValueError(
                f"edge_weight: expected one tensor for each of the {count} layers, found {len(edge_weight)}"
            )
        return list(edge_weight)

    def score(self, states: Tensor | Sequence[Tensor], query: Tensor) -> Tensor:
        """mlp([state ; query]) for every row of the states.

        The first map is split, W [x ; q] = W_x x + W_q q, so the query's half is computed once and nothing is
        concatenated or repeated. Without gradient it goes by blocks of rows.

        Args:
            states: [M, B, D] (any M rows), or with concat_hidden a list of them.
            query: [B, D].

        Returns:
            [M, B] logits, float32 (float64 for a float64 model).
        """
        parts = [states] if isinstance(states, Tensor) else list(states)
        M, B = parts[0].shape[:2]
        rows = max(1, CHUNK_NUMBERS // max(1, B * (self.settings.state_dim + self.settings.input_dim)))
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (*parts, query, *self.mlp.parameters()))
        if tracked or M <= rows:
            return self._score(parts, query)
        return torch.cat([self._score([p[i : i + rows] for p in parts], query) for i in range(0, M, rows)])

    def _score(self, parts: list[Tensor], query: Tensor) -> Tensor:
        maps = [step for step in self.mlp if isinstance(step, nn.Linear)]
        first, last = maps[0], maps[-1]
        blocks = first.weight.split([*(p.shape[-1] for p in parts), query.shape[-1]], dim=1)
        c = F.linear(query, blocks[-1], first.bias)  # [B, H]
        h = F.linear(parts[0], blocks[0])  # [M, B, D] -> [M, B, H]
        for part, block in zip(parts[1:], blocks[1:-1], strict=True):
            h = h + F.linear(part, block)
        if len(maps) == 1:
            return (h + c).squeeze(-1).to(_wide(h))  # [M, B, 1] -> [M, B]
        for step in maps[1:-1]:
            h = F.linear(torch.relu(h + c), step.weight)  # its bias takes the place of the query's half
            c = step.bias.expand(h.shape[1], -1)
        return relu_dot(h, c, last.weight[0]) + last.bias.to(_wide(h))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
