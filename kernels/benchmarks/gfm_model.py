"""The whole graph foundation model: ours against the same model on PyG, and active rows against the dense path.

    python kernels/benchmarks/gfm_model.py [--csv FILE] [--batch 1 4] [--graph synthetic|FOLDER ...]
    python kernels/benchmarks/gfm_model.py --part rows --graph path/to/musique_plus
    python kernels/benchmarks/gfm_model.py --device cuda --nodes 90000 --triples 250000 --relations 10000 \
        --batch 1 4 8 --dtype float32 bfloat16 --without pyg

Part "model": forward (inference: relation tables kept, as in use) and forward with all gradients, at 6 layers of 512
numbers by default. "reference" is our model on plain PyTorch ops, "products" its matrix products alone, the
floor of the dense path. Part "rows": one question at a time from the folder's test set, on a model that keeps the
background, against the dense path. Methods take turns within one run.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from measure import append_rows, in_turn, memory_growth, show, where
from pyg_peer import PygRetriever
from ragkit_kernels.relational_conv import backends
from relational_conv import Graph, memory, read, synthetic
from torch import Tensor

from ragkit.gfm import GFMSettings, GNNRetriever
from ragkit.graph import KnowledgeGraph

TEXT_DIM = 768
METHODS = ["ragkit", "pyg", "reference", "products"]
SIZES = ("nodes", "triples", "relations", "dim", "layers", "threads")


class PygGraph:
    """What `GNNRetriever` reads of a PyG `Data`."""

    def __init__(self, graph: Graph, device: str) -> None:
        dst, src, rel, N, R = graph
        self.edge_index, self.edge_type = torch.stack([dst, src]).to(device), rel.to(device)
        self.num_nodes, self.num_relations = N, R
        g = torch.Generator().manual_seed(3)
        self.rel_emb = torch.randn(R, TEXT_DIM, generator=g).to(device)


class Case:
    """Both models with the same weights on one graph."""

    def __init__(self, graph: Graph, batch: int, dim: int, layers: int, dtype: torch.dtype, device: str) -> None:
        self.device, self.dtype = device, dtype
        self.graph = PygGraph(graph, device)
        torch.manual_seed(0)
        settings = GFMSettings(rel_emb_dim=TEXT_DIM, input_dim=dim, hidden_dims=[dim] * layers)
        self.ours = GNNRetriever(settings).to(device)
        self.ours.rows = "dense"
        self.theirs = PygRetriever(dim, layers, TEXT_DIM).to(device)
        self.theirs.load_state_dict(self.ours.state_dict())
        g = torch.Generator().manual_seed(1)
        self.question = torch.randn(batch, TEXT_DIM, generator=g).to(device)
        seeds = torch.randint(graph[3], (batch, 3), generator=g)
        self.mask = torch.zeros(batch, graph[3]).scatter_(1, seeds, 1.0).to(device)

    def run(self, method: str) -> Tensor:
        with torch.autocast(self.device.split(":")[0], self.dtype, enabled=self.dtype != torch.float32):
            if method == "pyg":
                g = self.graph
                return self.theirs(g.edge_index.flip(0), g.edge_type, g.rel_emb, self.question, self.mask)
            if method == "products":
                return self.products()
            if method == "reference":
                kept, backends.use_kernel = backends.use_kernel, lambda *_: False
                try:
                    return self.ours(self.graph, self.question, self.mask)
                finally:
                    backends.use_kernel = kept
            return self.ours(self.graph, self.question, self.mask)

    def products(self) -> Tensor:
        """The matrix products of the dense path, on buffers that are there already."""
        settings = self.ours.settings
        rows, D = self.graph.num_nodes * len(self.question), settings.input_dim
        if not hasattr(self, "z"):
            self.z = torch.zeros(rows, 2 * D, device=self.device)
        out = self.z
        for layer in self.ours.entity_model.layers:
            out = layer.linear(self.z)
        return out @ self.ours.entity_model.mlp[0].weight[:, :D].T

    def call(self, method: str, backward: bool) -> None:
        model = self.theirs if method == "pyg" else self.ours
        model.train(backward)
        if not backward:
            with torch.no_grad():
                self.run(method)
            return
        out = self.run(method)
        torch.autograd.grad(out.float().sum(), list(model.parameters()))


def model_rows(args: argparse.Namespace, name: str, dtype: str, batch: int) -> list[dict[str, Any]]:
    """Rows of every method, forward and with gradients."""
    graph = read(name, args)
    case = Case(graph, batch, args.dim, args.layers, getattr(torch, dtype), args.device)
    if "pyg" not in args.without and dtype == "float32":
        with torch.no_grad():
            torch.testing.assert_close(case.run("ragkit"), case.run("pyg"), rtol=1e-3, atol=1e-3)
    rows = []
    for backward in (False, True):
        methods = [m for m in METHODS if m not in args.without and not (backward and m == "products")]
        case.ours.eval()
        times = in_turn({m: partial(case.call, m, backward) for m in methods}, args.rounds, args.device)
        for method in methods:
            rows.append(
                {
                    **row_start(args, name, graph[3], len(graph[0]), graph[4], batch, dtype),
                    "part": "model",
                    "pass": "forward+backward" if backward else "forward",
                    "method": method,
                    "ms": round(times[method]["ms"], 1),
                    "cpu_s": round(times[method]["cpu_s"], 2),
                    "peak_mib": round(memory(args, name, dtype, batch, case, method, backward, __file__, SIZES), 0),
                    "times_peer": round(times["pyg"]["ms"] / times[method]["ms"], 2) if "pyg" in times else "",
                }
            )
    return rows


def row_start(
    args: argparse.Namespace, name: str, nodes: int, edges: int, relations: int, batch: int, dtype: str
) -> dict[str, Any]:
    """The columns that say what was measured where."""
    return {
        **where(args.device),
        "graph": Path(name).name,
        "nodes": nodes,
        "edges": edges,
        "relations": relations,
        "layers": args.layers,
        "dim": args.dim,
        "batch": batch,
        "dtype": dtype,
    }


def question_rows(args: argparse.Namespace, folder: str, dtype: str) -> list[dict[str, Any]]:
    """One question at a time of a data set: active rows against the dense path, background and tables kept."""
    graph = KnowledgeGraph.load(folder)
    g = torch.Generator().manual_seed(3)
    graph.rel_emb = torch.randn(2 * graph.num_relations, TEXT_DIM, generator=g)
    torch.manual_seed(0)
    settings = GFMSettings(rel_emb_dim=TEXT_DIM, input_dim=args.dim, hidden_dims=[args.dim] * args.layers)
    model = GNNRetriever(settings).to(args.device).eval()
    path = Path(folder) / "processed" / "stage1" / "test.json"
    questions = json.loads(path.read_text(encoding="utf-8"))[: args.questions]
    text = torch.randn(1, TEXT_DIM, generator=g).to(args.device)
    seeds = [[int(i) for i in graph.entities.ids(q["question_entities"]) if i >= 0] for q in questions]

    def ask(rows: str, ids: list[int]) -> Tensor:
        model.rows = rows
        with torch.no_grad(), torch.autocast(args.device.split(":")[0], getattr(torch, dtype), dtype != "float32"):
            return model(graph, text, [ids])

    totals: dict[str, list[float]] = {"dense": [], "active": [], "auto": []}
    cpu: dict[str, list[float]] = {name: [] for name in totals}
    worst = 0.0
    for ids in seeds:
        times = in_turn({rows: partial(ask, rows, ids) for rows in totals}, args.rounds, args.device)
        for rows in totals:
            totals[rows].append(times[rows]["ms"])
            cpu[rows].append(times[rows]["cpu_s"])
        dense = ask("dense", ids)
        worst = max(worst, float((ask("active", ids) - dense).abs().max() / dense.abs().max()))
    print(f"{len(seeds)} questions; largest difference of the logits, of the largest logit: {worst:.1e}")
    base = row_start(args, folder, graph.num_entities, 2 * graph.num_triples, 2 * graph.num_relations, 1, dtype)
    return [
        {
            **base,
            "part": "rows",
            "pass": "forward",
            "method": rows,
            "ms": round(mean(totals[rows]), 1),
            "cpu_s": round(mean(cpu[rows]), 3),
            "peak_mib": "",
            "times_peer": round(sum(totals["dense"]) / sum(totals[rows]), 2),
        }
        for rows in totals
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", default=None, help="append the rows to this file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", nargs="+", default=["model"], choices=["model", "rows"])
    parser.add_argument("--graph", nargs="+", default=["synthetic"], help='"synthetic", or data set folders')
    parser.add_argument("--nodes", type=int, default=20_000)
    parser.add_argument("--triples", type=int, default=80_000)
    parser.add_argument("--relations", type=int, default=1_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="float32, or autocast to float16 or bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=20, help="questions of part rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--without", nargs="*", default=[], help="methods to leave out")
    parser.add_argument("--memory", nargs=2, default=None, help=argparse.SUPPRESS)  # METHOD BACKWARD, in a child
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory:
        method, backward = args.memory[0], args.memory[1] == "1"
        sizes = args.batch[0], args.dim, args.layers, getattr(torch, args.dtype[0]), args.device
        small, case = Case(synthetic(50, 100, 5), *sizes), Case(read(args.graph[0], args), *sizes)
        print(memory_growth(partial(small.call, method, backward), partial(case.call, method, backward), args.device))
        return
    rows: list[dict[str, Any]] = []
    for name in args.graph:
        for dtype in args.dtype:
            found: list[dict[str, Any]] = []
            if "model" in args.part:
                for batch in args.batch:
                    found += model_rows(args, name, dtype, batch)
            if "rows" in args.part and name != "synthetic":
                found += question_rows(args, name, dtype)
            columns = ["graph", "batch", "dtype", "part", "pass", "method", "ms", "cpu_s", "peak_mib", "times_peer"]
            print(show(found, columns), end="\n\n", flush=True)
            rows += found
    if args.csv:
        append_rows(args.csv, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
