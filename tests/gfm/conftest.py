"""Golden numbers of GFM-RAG v1, a plain PyTorch model of the same maths, and small graphs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from ragkit.gfm import GFMSettings, GNNRetriever, QueryGNN
from ragkit.graph import KnowledgeGraph

SHARED = Path(os.environ.get("RAGKIT_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))


class Graph:
    """The fields of PyG's Data that the model reads."""

    def __init__(self, edge_index, edge_type, num_nodes, num_relations, rel_emb=None):
        self.edge_index, self.edge_type = edge_index, edge_type
        self.num_nodes, self.num_relations, self.rel_emb = num_nodes, num_relations, rel_emb

    def without(self, drop):
        """A new graph without the edges where `drop` is True."""
        kept = ~drop
        return Graph(self.edge_index[:, kept], self.edge_type[kept], self.num_nodes, self.num_relations, self.rel_emb)

    def flipped(self):
        """The same with every edge turned round."""
        return Graph(self.edge_index.flip(0), self.edge_type, self.num_nodes, self.num_relations, self.rel_emb)


@pytest.fixture(scope="session")
def golden():
    """golden(name): tensors t, meta, graph, and the models with the file's weights."""

    def load(name):
        path = SHARED / "golden" / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(f"no {path.name} in RAGKIT_SHARED or ../shared/golden")
        with safe_open(str(path), "pt") as file:
            meta = json.loads(file.metadata()["meta"])
            t = {key: file.get_tensor(key) for key in file.keys()}
        graph = Graph(
            t["graph.edge_index"],
            t["graph.edge_type"],
            meta["num_nodes"],
            meta["num_relations"],
            t["graph.rel_emb"],
        )
        settings = GFMSettings(rel_emb_dim=meta["rel_emb_dim"], **meta["entity_model"])
        model = GNNRetriever(settings)
        model.load_state_dict(_part(t, "state."))
        pretrained = QueryGNN(settings)
        pretrained.load_state_dict(_part(t, "pretrain.state."))
        inputs = t["question_embeddings"], t["question_entities_mask"], t["entities_weight"]
        return SimpleNamespace(t=t, meta=meta, graph=graph, model=model, pretrained=pretrained, inputs=inputs)

    return load


def _part(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.fixture(scope="session")
def plain():
    """plain(model, graph, embeddings, mask, weight, edge_weight): [B, N] logits by the guide's formulas, with scatter
    and concatenation, whatever the kernels do. Of equal maxima every message has the whole gradient, as in v1."""
    return plain_logits


def plain_logits(model, graph, embeddings, mask, weight=None, edge_weight=None):
    s = model.settings
    head, tail = graph.edge_index
    N, B = graph.num_nodes, len(embeddings)
    q = model.question_mlp(embeddings)  # [B, D]
    mask = mask if weight is None else mask * weight
    x0 = mask.t().unsqueeze(-1).to(q.dtype) * q  # [N, B, D]
    R0 = model.rel_mlp(graph.rel_emb.to(q.dtype))
    degree = torch.bincount(head, minlength=N).to(q.dtype)[:, None, None] + 1
    x, hidden = x0, []
    for layer in model.entity_model.layers:
        rel = layer.relation_projection(R0)[graph.edge_type].unsqueeze(1)  # [E, 1, D]
        messages = x[tail] * rel if s.message_func == "distmult" else x[tail] + rel
        squares = messages.square()
        if edge_weight is not None:
            messages, squares = messages * edge_weight[:, None, None], squares * edge_weight[:, None, None]
        total = x0.index_add(0, head, messages)
        if s.aggregate_func == "sum":
            update = total
        elif s.aggregate_func == "mean":
            update = total / degree
        else:
            update = torch.maximum(_largest(messages, head, N), x0)
        if s.aggregate_func == "pna":
            mean, smallest = total / degree, -torch.maximum(_largest(-messages, head, N), -x0)
            std = ((x0 * x0).index_add(0, head, squares) / degree - mean * mean).clamp(min=1e-6).sqrt()
            features = torch.stack([mean, update, smallest, std], -1).flatten(-2)  # (d, aggregator)
            scale = degree.log() / degree.log().mean()
            scales = torch.cat([torch.ones_like(scale), scale, 1 / scale.clamp(min=1e-2)], -1)  # [N, 1, 3]
            update = (features.unsqueeze(-1) * scales.unsqueeze(-2)).flatten(-2)  # (d, aggregator, scaler)
        h = layer.linear(torch.cat([x, update], -1))
        y = F.relu(h if layer.layer_norm is None else layer.layer_norm(h))
        x = y + x if s.short_cut and y.shape == x.shape else y
        hidden.append(x)
    states = hidden if s.concat_hidden else hidden[-1:]
    return model.entity_model.mlp(torch.cat([*states, q.expand(N, B, -1)], -1)).squeeze(-1).t()


def _largest(messages, head, N):
    index = head[:, None, None].expand_as(messages)
    values = messages.detach()
    best = torch.full((N, *messages.shape[1:]), torch.finfo(values.dtype).min, dtype=values.dtype)
    best = best.scatter_reduce(0, index, values, "amax")
    tied = values == best[head]
    return best.index_add(0, head, torch.where(tied, messages - values, 0))  # the value of one, the gradient of each


@pytest.fixture
def case():
    """case(**settings): a model with random weights, a random graph with inverse edges, and inputs without zeros (so
    that no two messages are equal)."""

    def make(seed=0, nodes=23, triples=40, relations=3, questions=3, dtype=torch.float32, **kinds):
        g = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        settings = GFMSettings(**{"rel_emb_dim": 7, "input_dim": 6, "hidden_dims": [6, 6, 6], **kinds})
        model = GNNRetriever(settings).to(dtype)
        head, tail = torch.randint(nodes, (2, triples), generator=g)
        kind = torch.randint(relations, (triples,), generator=g)
        index = torch.stack([torch.cat([head, tail]), torch.cat([tail, head])])
        rel_emb = torch.randn(2 * relations, settings.rel_emb_dim, generator=g, dtype=dtype)
        graph = Graph(index, torch.cat([kind, kind + relations]), nodes, 2 * relations, rel_emb)
        embeddings = torch.randn(questions, settings.rel_emb_dim, generator=g, dtype=dtype)
        mask = torch.rand(questions, nodes, generator=g, dtype=dtype) + 0.1
        return SimpleNamespace(model=model, graph=graph, embeddings=embeddings, mask=mask)

    return make


@pytest.fixture
def world():
    """A KnowledgeGraph of four entities, two relations and three documents."""
    return KnowledgeGraph.from_triples(
        [("lima", "capital of", "peru"), ("peru", "borders", "chile"), ("santiago", "capital of", "chile")],
        {"Peru": ["peru", "lima", "chile"], "Chile": ["chile", "peru"], "Santiago": ["santiago", "chile"]},
    )


class LetterEncoder:
    """Embeds a text as its letter counts: an encoder without weights, whose every call is counted."""

    name = "letters"

    def __init__(self, scale=1.0):
        self.scale, self.calls = scale, 0

    def encode(self, texts, side):
        self.calls += 1
        rows = [[text.count(letter) + (side == "query") for letter in "abcdefgh"] for text in texts]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(texts), 8) * self.scale


@pytest.fixture
def letters():
    """letters(scale): a new LetterEncoder."""
    return LetterEncoder
