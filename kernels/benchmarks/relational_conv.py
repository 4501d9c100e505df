"""K1, relational message passing: ours against PyG, a plain torch scatter, and torch.compile of both.

    python kernels/benchmarks/relational_conv.py [--csv FILE] [--batch 1 4] [--graph synthetic|FOLDER]
    python kernels/benchmarks/relational_conv.py --device cuda --nodes 90000 --triples 250000 --relations 10000 \
        --batch 1 4 8 --dtype float32 bfloat16

Two parts: the op alone (relation table given), and a whole layer (relation projection, messages, matrix product,
LayerNorm, ReLU, residual). Forward, and forward with all gradients. The methods take turns in one run; peak memory is
what one call adds, on a CPU in a process of its own. FOLDER is a data set in the GFM-RAG layout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import append_rows, in_child, in_turn, memory_growth, show, where
from pyg_peer import PygConv, PygLayer
from ragkit_kernels.relational_conv import (
    GraphLayout,
    build_layout,
    relational_conv,
    relational_layer,
    relational_layer_,
    relational_step,
)
from torch import Tensor

Graph = tuple[Tensor, Tensor, Tensor, int, int]  # dst [E], src [E], rel [E], N, R (inverses included)


def synthetic(nodes: int, triples: int, relations: int, seed: int = 0) -> Graph:
    """A power-law graph of random triples and their inverses."""
    g = torch.Generator().manual_seed(seed)

    def skewed(size: int) -> Tensor:
        weights = (torch.arange(size) + 1.0) ** -0.8
        return torch.searchsorted(weights.cumsum(0) / weights.sum(), torch.rand(triples, generator=g)).clamp(
            max=size - 1
        )

    head, tail, relation = skewed(nodes), skewed(nodes), skewed(relations)
    return doubled(head, relation, tail, nodes, relations)


def doubled(head: Tensor, relation: Tensor, tail: Tensor, nodes: int, relations: int) -> Graph:
    """Triples with their inverses; messages go from tail to head."""
    dst, src = torch.cat([head, tail]), torch.cat([tail, head])
    return dst, src, torch.cat([relation, relation + relations]), nodes, 2 * relations


def read(name: str, args: argparse.Namespace) -> Graph:
    """The synthetic graph, or that of a folder."""
    if name == "synthetic":
        return synthetic(args.nodes, args.triples, args.relations)
    from ragkit.graph import KnowledgeGraph

    graph = KnowledgeGraph.load(name)
    columns = (torch.from_numpy(c).long() for c in (graph.head, graph.relation, graph.tail))
    return doubled(*columns, graph.num_entities, graph.num_relations)


class Case:
    """Inputs of one size, and every method on them."""

    def __init__(self, graph: Graph, batch: int, dim: int, dtype: torch.dtype, device: str) -> None:
        dst, src, rel, N, R = graph
        g = torch.Generator().manual_seed(1)
        self.layout: GraphLayout = build_layout(dst, src, rel, N, R).to(device)
        self.dst, self.src, self.rel = dst.to(device), src.to(device), rel.to(device)
        self.edge_index = torch.stack([self.src, self.dst])

        def draw(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=g) / 4).to(device, dtype).requires_grad_()

        self.x, self.relation, self.query = draw(N, batch, dim), draw(R, dim), draw(batch, dim)
        seeds = torch.randint(N, (3, batch), generator=g)
        self.mask = torch.zeros(N, batch).scatter_(0, seeds, 1.0).to(device, dtype)
        self.x_pyg = self.x.detach().transpose(0, 1).contiguous().requires_grad_()  # batch-major, as that kit has it
        self.gradient = draw(N, batch, dim).detach()
        torch.manual_seed(2)
        self.layer = PygLayer(dim).to(device, dtype)
        self.conv = PygConv()
        self.compiled: dict[str, Callable[..., Tensor]] = {}

    def dense_boundary(self) -> Tensor:
        return (self.mask.unsqueeze(-1) * self.query).transpose(0, 1)  # [B, N, D]

    def op_ragkit(self) -> Tensor:
        return relational_conv(self.x, self.relation, self.layout, boundary=(self.mask, self.query))

    def op_pyg(self) -> Tensor:
        relation = self.relation.expand(self.x.shape[1], -1, -1)
        return self.conv(self.x_pyg, relation, self.dense_boundary(), self.edge_index, self.rel)

    def op_pyg_compile(self) -> Tensor:
        if "pyg" not in self.compiled:
            self.compiled["pyg"] = torch.compile(self.conv)
        relation = self.relation.expand(self.x.shape[1], -1, -1)
        return self.compiled["pyg"](self.x_pyg, relation, self.dense_boundary(), self.edge_index, self.rel)

    def op_compile(self) -> Tensor:
        if "op" not in self.compiled:
            self.compiled["op"] = torch.compile(plain_scatter)
        return self.compiled["op"](self.x, self.relation, self.mask, self.query, self.dst, self.src, self.rel)

    def op_scatter(self) -> Tensor:
        return plain_scatter(self.x, self.relation, self.mask, self.query, self.dst, self.src, self.rel)

    def layer_ragkit(self) -> Tensor:
        layer = self.layer
        table = layer.relation_projection(self.relation)
        z = relational_step(self.x, table, self.layout, boundary=(self.mask, self.query))
        linear, norm = layer.linear, layer.layer_norm
        run = relational_layer if torch.is_grad_enabled() else relational_layer_
        return run(z, linear.weight, linear.bias, norm.weight, norm.bias, None, self.layout)

    def layer_pyg(self) -> Tensor:
        relation = self.relation.expand(self.x.shape[1], -1, -1)
        return self.layer(self.x_pyg, relation, self.dense_boundary(), self.edge_index, self.rel)

    def layer_products(self) -> Tensor:
        """The bound: the layer's matrix products alone."""
        z = self.x.new_empty(self.x.shape[0] * self.x.shape[1], 2 * self.x.shape[2])
        self.layer.relation_projection(self.relation)
        return self.layer.linear(z)

    def inputs(self, method: str) -> list[Tensor]:
        """What a method gives gradients for."""
        own = [self.x_pyg if "pyg" in method else self.x, self.relation]
        return own + (list(self.layer.parameters()) if "layer" in method else [self.query])

    def call(self, method: str, backward: bool) -> None:
        run = getattr(self, method)
        if not backward:
            with torch.no_grad():
                run()
            return
        out = run()
        torch.autograd.grad(out, self.inputs(method), self.gradient.view_as(out))


def plain_scatter(
    x: Tensor, relation: Tensor, mask: Tensor, query: Tensor, dst: Tensor, src: Tensor, rel: Tensor
) -> Tensor:
    """index_add of gathered products."""
    return (mask.unsqueeze(-1) * query).index_add(0, dst, x[src] * relation[rel].unsqueeze(1))


METHODS = {
    "op": ["op_ragkit", "op_pyg", "op_pyg_compile", "op_compile", "op_scatter"],
    "layer": ["layer_ragkit", "layer_pyg", "layer_products"],
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", default=None, help="append the rows to this file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--graph", nargs="+", default=["synthetic"])
    parser.add_argument("--nodes", type=int, default=20_000)
    parser.add_argument("--triples", type=int, default=80_000)
    parser.add_argument("--relations", type=int, default=1_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--part", nargs="+", default=["op", "layer"], choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--without", nargs="*", default=[], help="methods to leave out, such as op_compile")
    parser.add_argument("--memory", nargs=2, default=None, help=argparse.SUPPRESS)  # METHOD BACKWARD, in a child
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory:
        method, backward = args.memory[0], args.memory[1] == "1"
        small = Case(synthetic(50, 100, 5), args.batch[0], args.dim, getattr(torch, args.dtype[0]), args.device)
        case = Case(read(args.graph[0], args), args.batch[0], args.dim, getattr(torch, args.dtype[0]), args.device)
        print(memory_growth(partial(small.call, method, backward), partial(case.call, method, backward), args.device))
        return
    rows: list[dict[str, Any]] = []
    for name in args.graph:
        graph = read(name, args)
        for dtype in args.dtype:
            for batch in args.batch:
                case = Case(graph, batch, args.dim, getattr(torch, dtype), args.device)
                for part in args.part:
                    for backward in (False, True):
                        rows += measure(args, name, graph, dtype, batch, case, part, backward)
    if args.csv:
        append_rows(args.csv, rows)


def measure(
    args: argparse.Namespace, name: str, graph: Graph, dtype: str, batch: int, case: Case, part: str, backward: bool
) -> list[dict[str, Any]]:
    """Rows of every method of one part."""
    methods = [m for m in METHODS[part] if m not in args.without and not (backward and m == "layer_products")]
    times = in_turn({m: partial(case.call, m, backward) for m in methods}, args.rounds, args.device)
    rows = []
    for method in methods:
        peak = memory(args, name, dtype, batch, case, method, backward)
        rows.append(
            {
                **where(args.device),
                "graph": Path(name).name,
                "nodes": graph[3],
                "edges": len(graph[0]),
                "relations": graph[4],
                "dim": args.dim,
                "batch": batch,
                "dtype": dtype,
                "part": part,
                "pass": "forward+backward" if backward else "forward",
                "method": method.removeprefix(f"{part}_"),
                "ms": round(times[method]["ms"], 2),
                "cpu_s": round(times[method]["cpu_s"], 3),
                "peak_mib": round(peak, 1),
                "times_pyg": round(times[f"{part}_pyg"]["ms"] / times[method]["ms"], 2)
                if f"{part}_pyg" in times
                else "",
            }
        )
    columns = ["graph", "batch", "dtype", "part", "pass", "method", "ms", "cpu_s", "peak_mib", "times_pyg"]
    print(show(rows, columns), end="\n\n", flush=True)
    return rows


def memory(
    args: argparse.Namespace, name: str, dtype: str, batch: int, case: Any, method: str, backward: bool,
    script: str = __file__, sizes: Sequence[str] = ("nodes", "triples", "relations", "dim", "threads"),
) -> float:  # fmt: skip
    """Peak memory of one call, weights, graph and inputs not counted; on a CPU in a new process of the script."""
    if args.device.startswith("cuda"):
        return memory_growth(lambda: None, partial(case.call, method, backward), args.device)
    options = [f"--{key}={getattr(args, key)}" for key in sizes]
    where_to = ["--graph", name, "--batch", str(batch), "--dtype", dtype]
    return in_child(script, *options, *where_to, "--memory", method, str(int(backward)))


if __name__ == "__main__":
    main(sys.argv[1:])
