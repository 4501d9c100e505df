"""Small graphs with every shape that breaks a message-passing kernel, and hypothesis strategies for more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from ragkit_kernels.relational_conv import GraphLayout, build_layout


@dataclass(frozen=True)
class Edges:
    """An edge list as the tests hold it."""

    dst: torch.Tensor
    src: torch.Tensor
    rel: torch.Tensor
    nodes: int
    relations: int

    def layout(self) -> GraphLayout:
        return build_layout(self.dst, self.src, self.rel, self.nodes, self.relations)

    def __len__(self) -> int:
        return len(self.dst)


def edges(triples: list[tuple[int, int, int]], nodes: int, relations: int) -> Edges:
    """From (dst, src, rel) triples."""
    columns = torch.tensor(triples, dtype=torch.int64).reshape(-1, 3).unbind(1)
    return Edges(*columns, nodes, relations)


def random_edges(nodes: int, count: int, relations: int, seed: int = 0, hub: int = 0) -> Edges:
    """Uniform edges, the first `hub` of them into node 0."""
    g = torch.Generator().manual_seed(seed)
    dst, src = torch.randint(nodes, (count,), generator=g), torch.randint(nodes, (count,), generator=g)
    dst[:hub] = 0
    return Edges(dst, src, torch.randint(relations, (count,), generator=g), nodes, relations)


def degrees(counts: list[int], relations: int = 3) -> Edges:
    """Node i has `counts[i]` edges into it."""
    dst = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    g = torch.Generator().manual_seed(1)
    src = torch.randint(len(counts), (len(dst),), generator=g)
    return Edges(dst, src, torch.randint(relations, (len(dst),), generator=g), len(counts), relations)


GRAPHS = {
    "no edge": edges([], 5, 2),
    "no node": edges([], 0, 1),
    "one node": edges([(0, 0, 0)], 1, 1),
    "isolated nodes, self loops, equal edges": edges([(1, 1, 0), (1, 1, 0), (3, 1, 1), (3, 1, 2), (3, 1, 1)], 6, 4),
    "a hub with all edges": random_edges(20, 300, 4, hub=300),
    "one relation with all edges": random_edges(15, 200, 1, seed=2),
    "unused relation ids": Edges(*(random_edges(9, 40, 2, seed=3).__dict__[k] for k in ("dst", "src", "rel")), 9, 50),
    "degrees around the split size": degrees([63, 64, 65, 0, 127, 128, 129, 1, 2, 0]),
    "random": random_edges(40, 150, 7, seed=4, hub=20),
}


@st.composite
def any_edges(draw) -> Edges:
    """Up to 12 nodes and 90 edges; ids are drawn from small ranges, so that hubs and equal edges are common."""
    nodes, relations = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    count = draw(st.integers(0, 90))
    few_nodes, few_relations = draw(st.integers(1, nodes)), draw(st.integers(1, relations))
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    dst = torch.randint(draw(st.integers(1, few_nodes)), (count,), generator=g)
    src, rel = torch.randint(few_nodes, (count,), generator=g), torch.randint(few_relations, (count,), generator=g)
    return Edges(dst, src, rel, nodes, relations)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same for the same shape and seed, with gradient."""
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def same(run: Callable[[str], torch.Tensor], inputs: list[torch.Tensor], rtol: float = 1e-10) -> None:
    """`run("kernel")` and `run("reference")` give equal values and gradients."""
    out, wanted = run("kernel"), run("reference")
    torch.testing.assert_close(out, wanted, rtol=rtol, atol=rtol)
    g = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(wanted.dtype)
    for ours, theirs in zip(torch.autograd.grad(out, inputs, g), torch.autograd.grad(wanted, inputs, g), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
