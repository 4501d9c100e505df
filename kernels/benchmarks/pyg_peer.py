"""The peer: the same maths on PyG's message passing, as GFM-RAG's and ULTRA's layers do it without their C++ kernel.

Messages are gathered, multiplied, joined with the boundary, multiplied by their edge weights (ones) and scattered, as
[B, E + N, D] tensors; every query has its own copy of the relation table and of its projection; states and update,
states and query are concatenated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import scatter


class PygConv(MessagePassing):
    """out[dst] = boundary[dst] + Σ relation[rel] ⊙ x[src] on batch-major states [B, N, D]."""

    def __init__(self) -> None:
        super().__init__(aggr=None, node_dim=1)

    def forward(self, x: Tensor, relation: Tensor, boundary: Tensor, edge_index: Tensor, edge_type: Tensor) -> Tensor:
        """x [B, N, D], relation [B, R, D], boundary [B, N, D], edge_index [2, E] (src, dst) -> [B, N, D]."""
        return self.propagate(
            edge_index, x=x, relation=relation, boundary=boundary, edge_type=edge_type, size=(x.shape[1],) * 2
        )

    def message(self, x_j: Tensor, relation: Tensor, boundary: Tensor, edge_type: Tensor) -> Tensor:
        messages = relation.index_select(1, edge_type) * x_j  # [B, E, D]
        return torch.cat([messages, boundary], dim=1)  # [B, E + N, D]

    def aggregate(self, inputs: Tensor, index: Tensor, dim_size: int) -> Tensor:
        index = torch.cat([index, torch.arange(dim_size, device=index.device)])
        weight = torch.ones(len(index), 1, device=inputs.device, dtype=inputs.dtype)
        return scatter(inputs * weight, index, dim=1, dim_size=dim_size, reduce="sum")


class PygLayer(nn.Module):
    """One layer: relation projection on every query's copy, messages, Linear([x ; u]), LayerNorm, ReLU, residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = PygConv()
        self.relation_projection = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.linear = nn.Linear(2 * dim, dim)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, relation: Tensor, boundary: Tensor, edge_index: Tensor, edge_type: Tensor) -> Tensor:
        update = self.conv(x, self.relation_projection(relation), boundary, edge_index, edge_type)
        return torch.relu(self.layer_norm(self.linear(torch.cat([x, update], dim=-1)))) + x


class PygRetriever(nn.Module):
    """The GFM: L layers and the scoring head, with the names of GFM-RAG's state dict."""

    def __init__(self, dim: int, layers: int, text_dim: int) -> None:
        super().__init__()
        self.rel_mlp, self.question_mlp = nn.Linear(text_dim, dim), nn.Linear(text_dim, dim)
        self.entity_model = nn.Module()
        self.entity_model.layers = nn.ModuleList(PygLayer(dim) for _ in range(layers))
        self.entity_model.mlp = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, 1))

    def forward(
        self, edge_index: Tensor, edge_type: Tensor, rel_emb: Tensor, question: Tensor, mask: Tensor
    ) -> Tensor:
        """edge_index [2, E] (src, dst), rel_emb [R, F], question [B, F], mask [B, N] -> logits [B, N]."""
        query = self.question_mlp(question)  # [B, D]
        relation = self.rel_mlp(rel_emb).unsqueeze(0).expand(len(query), -1, -1)  # [B, R, D]
        boundary = mask.unsqueeze(-1) * query.unsqueeze(1)  # [B, N, D]
        x = boundary
        for layer in self.entity_model.layers:
            x = layer(x, relation, boundary, edge_index, edge_type)
        return self.entity_model.mlp(torch.cat([x, query.unsqueeze(1).expand_as(x)], dim=-1)).squeeze(-1)


def peer_loss(logits: Tensor, target: Tensor, temperature: float = 0.2, eps: float = 1e-5) -> Tensor:
    """0.3 BCE + 0.7 ListCE as GFM-RAG v1 computes them, op by op on logits and dense targets [B, N]."""
    positive = target > 0.5
    with torch.no_grad():
        weight = (logits / temperature).masked_fill(positive, -torch.inf).softmax(1)
        weight = torch.where(positive, 1 / positive.sum(1, keepdim=True).float(), weight)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    bce = ((bce * weight).sum(1) / weight.sum(1)).mean()
    p = logits.sigmoid()
    log = torch.log(p / (p.sum(1, keepdim=True) + eps) + eps)
    return 0.3 * bce + 0.7 * (-(log * target).sum(1) / target.sum(1)).mean()
