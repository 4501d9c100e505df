"""Finding a graph's edges by what they say, so that training can hide the answers from the message passing."""

from __future__ import annotations

import torch
from ragkit_kernels.relational_conv import GraphLayout
from torch import Tensor


class EdgeIndex:
    """Looks up edges by (destination, relation, source).

    The layout keeps the edges sorted by exactly that, so nothing is sorted here; two binary searches find an edge, and
    the keys fit int64 whatever the size of the graph.
    """

    def __init__(self, layout: GraphLayout) -> None:
        self.layout = layout
        src, rel, _ = layout.by_dst.edges.long()
        dst = torch.arange(layout.num_dst, device=src.device).repeat_interleave(layout.by_dst.ptr.long().diff())
        self._pairs, place = torch.unique_consecutive(dst * layout.num_relations + rel, return_inverse=True)
        self._keys = place * layout.num_nodes + src  # [E] ascending

    def mask_without(self, dst: Tensor, rel: Tensor, src: Tensor) -> Tensor:
        """[E] bool in the order the edges were given: False at every edge that is one of the K asked for.

        Args:
            dst, rel, src: [K] int64 ids; edges that are not in the graph count for nothing.
        """
        E = len(self._keys)
        keep = torch.ones(E, dtype=torch.bool, device=self._keys.device)
        if E == 0 or len(dst) == 0:
            return keep
        pair = dst * self.layout.num_relations + rel
        place = torch.searchsorted(self._pairs, pair).clamp(max=len(self._pairs) - 1)
        key = torch.where(self._pairs[place] == pair, place * self.layout.num_nodes + src, -1)
        first, last = torch.searchsorted(self._keys, key), torch.searchsorted(self._keys, key, right=True)
        depth = torch.zeros(E + 1, dtype=torch.int64, device=keep.device)  # equal edges lie side by side
        depth.index_add_(0, first, torch.ones_like(first)).index_add_(0, last, torch.full_like(last, -1))
        keep[self.layout.order.long()] = depth.cumsum(0)[:-1] == 0
        return keep


def inverse(rel: Tensor, num_relations: int) -> Tensor:
    """Ids of the inverse relations, where the second half of the R ids are the inverses of the first."""
    return (rel + num_relations // 2) % num_relations
