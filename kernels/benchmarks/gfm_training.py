"""One fine-tuning step of the graph foundation model, and one epoch: ours against the same model on PyG.

    python kernels/benchmarks/gfm_training.py --graph path/to/wiki2_mini [--csv FILE]
    python kernels/benchmarks/gfm_training.py --device cuda --nodes 90000 --triples 280000 --dim 512 --layers 6 \
        --batch 4 8 16 32 --dtype float32 bfloat16 --part step

A step is: a batch of the questions -> forward -> 0.3 BCE + 0.7 ListCE on all entities -> backward -> AdamW -> no
gradients. Part "step" takes the mean over a few batches, part "epoch" goes once through all questions; in both the
methods take turns, batch by batch. "pyg" is the peer (dense masks, a relation table for each question), "reference"
our model on plain PyTorch ops, "checkpointing" ours with gradient checkpointing, which matters to --rows dense and
where "auto" takes that path. Before anything is timed, losses, gradients and the weights after a step are compared.
FOLDER is a data set in the GFM-RAG layout; its texts' embeddings are random: the encoder takes no part in a step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import append_rows, in_child, in_turn, memory_growth, show, where
from pyg_peer import PygRetriever, peer_loss
from ragkit_kernels.relational_conv import backends, relu_dot
from relational_conv import read
from torch import Tensor
from torch_geometric.data import Data

from ragkit.gfm import GFMSettings, GNNRetriever, QuestionBatch, QuestionReport, QuestionSet, entity_weights
from ragkit.gfm.losses import retrieval_loss
from ragkit.gfm.ragged import Ragged
from ragkit.graph import KnowledgeGraph

METHODS = ["ragkit", "checkpointing", "reference", "pyg"]
SIZES = ("nodes", "triples", "relations", "questions", "dim", "layers", "text_dim", "threads", "device", "rows")
LEARNING_RATE = 5e-4


class RandomTexts:
    """Stands in for the text encoder."""

    def __init__(self, size: int) -> None:
        self.size = size

    def encode(self, texts: Sequence[str], side: str) -> Tensor:
        return torch.randn(len(texts), self.size, generator=torch.Generator().manual_seed(4))


class World:
    """A graph, its questions, and how much each entity weighs.

    Attributes:
        graph: As PyG's Data, with relation embeddings.
        questions: The questions.
        weight: [N] weights of the questions' entities.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        dst, src, rel, N, R = read(name, args)
        text = RandomTexts(args.text_dim)
        self.graph = Data(edge_index=torch.stack([dst, src]), edge_type=rel, num_nodes=N).to(args.device)
        self.graph.num_relations, self.graph.rel_emb = R, text.encode([""] * R, "passage").to(args.device)
        if name == "synthetic":
            self.weight = torch.ones(N, device=args.device)
            self.questions = random_questions(args.questions, N, text)
        else:
            known = KnowledgeGraph.load(name)
            self.weight = entity_weights(known).to(args.device)
            self.questions = QuestionSet.load(name, known, text, cache=False)  # type: ignore[arg-type]

    def batches(self, size: int) -> list[QuestionBatch]:
        """All questions in one random order."""
        order = torch.randperm(len(self.questions), generator=torch.Generator().manual_seed(5))
        return [self.questions.batch(part) for part in order.split(size)]


def random_questions(count: int, N: int, text: RandomTexts) -> QuestionSet:
    """Questions with two entities of their own, ten supporting ones and two documents."""
    g = torch.Generator().manual_seed(6)

    def lists(size: int) -> Ragged:
        return Ragged.of(torch.randint(N, (count, size), generator=g).tolist())

    ids = [str(i) for i in range(count)]
    return QuestionSet(
        ids=ids, rows=list(range(count)), questions=ids, embeddings=text.encode(ids, "query"),
        question_entities=lists(2), supporting_entities=lists(10), supporting_documents=lists(2),
        is_part=torch.zeros(count, dtype=torch.bool), report=QuestionReport("random", count),
    )  # fmt: skip


class Trainee:
    """One method's model and optimiser.

    Args:
        method: One of METHODS.
        world: What it is trained on.
        args: Sizes.
        dtype: float32, or what autocast computes in.
    """

    def __init__(self, method: str, world: World, args: argparse.Namespace, dtype: str) -> None:
        self.method, self.world, self.device, self.dtype = method, world, args.device, getattr(torch, dtype)
        torch.manual_seed(0)
        ours = GNNRetriever(
            GFMSettings(rel_emb_dim=args.text_dim, input_dim=args.dim, hidden_dims=[args.dim] * args.layers)
        )
        ours.rows = args.rows
        self.model: Any = ours
        if method == "pyg":
            self.model = PygRetriever(args.dim, args.layers, args.text_dim)
            self.model.load_state_dict(ours.state_dict())
        elif method == "checkpointing":
            ours.gradient_checkpointing_enable()
        self.model.to(args.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    def loss(self, batch: QuestionBatch) -> Tensor:
        """The loss of a batch, with everything that a step makes of its id lists."""
        graph, device = self.world.graph, self.device
        with torch.autocast(device.split(":")[0], self.dtype, enabled=self.dtype != torch.float32):
            if self.method == "pyg":
                mask, target = (
                    dense(ids, graph.num_nodes).to(device)
                    for ids in (batch.question_entities, batch.supporting_entities)
                )
                question, edges = batch.embeddings.to(device), graph.edge_index.flip(0)
                logits = self.model(edges, graph.edge_type, graph.rel_emb, question, mask * self.world.weight)
                return peer_loss(logits.float(), target)
            logits = self.model(graph, batch.embeddings, batch.question_entities, self.world.weight)
        return retrieval_loss(logits, batch.supporting_entities)

    def step(self, batch: QuestionBatch) -> None:
        """One step of training."""
        kept = backends.use_kernel
        if self.method == "reference":
            backends.use_kernel = lambda *_: False
        try:
            self.loss(batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        finally:
            backends.use_kernel = kept

    def steps(self, batches: Sequence[QuestionBatch]) -> None:
        """A step for each batch."""
        for batch in batches:
            self.step(batch)


def dense(lists: Sequence[Tensor], N: int) -> Tensor:
    """[B, N] 0/1 of B lists of ids."""
    mask = torch.zeros(len(lists), N)
    for row, ids in enumerate(lists):
        mask[row, ids] = 1
    return mask


def compare(ours: Trainee, theirs: Trainee, batches: Sequence[QuestionBatch]) -> str:
    """Checks that both learn the same: losses, gradients, the weights after a step and the loss with them.

    Raises:
        AssertionError: They do not.
    """
    text = []
    for batch in batches[:2]:
        losses = [trainee.loss(batch) for trainee in (ours, theirs)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
        text.append(f"loss {losses[0].item():.6f} and {losses[1].item():.6f}")
        for loss in losses:
            loss.backward()
        worst, others = 0.0, dict(theirs.model.named_parameters())
        for name, a in ours.model.named_parameters():
            b = others[name]
            assert a.grad is not None and b.grad is not None, name
            worst = max(worst, float((a.grad - b.grad).norm() / b.grad.norm().clamp(min=1e-6)))
        assert worst < 1e-2, f"gradients differ by {worst:.1e} of their norm"
        for trainee in (ours, theirs):
            trainee.optimizer.step()
            trainee.optimizer.zero_grad()
        # AdamW moves a weight by the sign of its gradient, which rounding turns round where the gradient is about 0.
        flat = [torch.cat([t.model.state_dict()[n].flatten() for n in others]) for t in (ours, theirs)]
        apart = float((flat[0] - flat[1]).abs().mean()) / LEARNING_RATE
        assert apart < 0.02, f"a step moved the weights differently, by {apart:.1e} of the learning rate"
        text.append(f"gradients to {worst:.0e}, weights to {apart:.0e} of a step")
    return "ours and the peer: " + "; ".join(text)


def epoch(trainees: dict[str, Trainee], batches: Sequence[QuestionBatch]) -> dict[str, dict[str, float]]:
    """Times one epoch of each method, a batch each in turn; as `in_turn`."""
    times = {method: {"ms": 0.0, "cpu_s": 0.0} for method in trainees}
    for batch in batches:
        for method, trainee in trainees.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            trainee.step(batch)
            if trainee.device.startswith("cuda"):
                torch.cuda.synchronize()
            times[method]["ms"] += 1000 * (time.perf_counter() - start)
            times[method]["cpu_s"] += time.process_time() - start_cpu
    return times


def memory(args: argparse.Namespace, name: str, dtype: str, batch: int, method: str) -> float:
    """MiB that a step adds at its peak to weights, optimiser, graph and questions; in a new process."""
    options = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in SIZES]
    return in_child(__file__, *options, "--graph", name, "--batch", str(batch), "--dtype", dtype, "--memory", method)


def memory_here(args: argparse.Namespace) -> float:
    """The number that `memory` reads."""
    method, dtype, size = args.memory, args.dtype[0], args.batch[0]
    world = World(args.graph[0], args)
    small = World("synthetic", argparse.Namespace(**{**vars(args), "nodes": 50, "triples": 100, "relations": 5}))
    trainees = [Trainee(method, w, args, dtype) for w in (small, world)]
    first, batch = small.batches(size)[0], world.batches(size)[0]
    trainees[0].step(first)  # compiles what it needs
    if method != "pyg":
        with torch.no_grad():  # the sorted graph, which a model makes once
            trainees[1].model(world.graph, batch.embeddings[:1], [[0]])
    peak_of_loading = Path("/proc/self/clear_refs")
    if peak_of_loading.exists():
        peak_of_loading.write_text("5")  # the highest resident set starts anew from the present one
    return memory_growth(partial(trainees[0].step, first), partial(trainees[1].step, batch), args.device)


def rows_of(args: argparse.Namespace, name: str, world: World, dtype: str, size: int) -> list[dict[str, Any]]:
    """Rows of every method for one batch size and dtype."""
    methods = [method for method in METHODS if method not in args.without]
    batches = world.batches(size)
    if "pyg" in methods and dtype == "float32":
        pair = (Trainee(method, world, args, dtype) for method in ("ragkit", "pyg"))
        print(compare(*pair, batches))
    trainees = {method: Trainee(method, world, args, dtype) for method in methods}
    peaks = {m: memory(args, name, dtype, size, m) if args.peaks else float("nan") for m in methods}
    rows = []
    for part in args.part:
        if part == "step":
            few = batches[: args.batches]
            times = in_turn({m: partial(t.steps, few) for m, t in trainees.items()}, args.rounds, args.device)
            times = {m: {key: value / len(few) for key, value in t.items()} for m, t in times.items()}
        else:
            times = epoch({m: t for m, t in trainees.items() if m in args.epoch}, batches)
        for method, found in times.items():
            peer = times.get("pyg")
            rows.append(
                {
                    **where(args.device),
                    "graph": Path(name).name,
                    "nodes": world.graph.num_nodes,
                    "edges": world.graph.num_edges,
                    "relations": world.graph.num_relations,
                    "questions": len(world.questions),
                    "layers": args.layers,
                    "dim": args.dim,
                    "batch": size,
                    "dtype": dtype,
                    "rows": args.rows,
                    "part": part,
                    "method": method,
                    "ms": round(found["ms"], 1),
                    "cpu_s": round(found["cpu_s"], 3),
                    "peak_mib": round(peaks[method], 1),
                    "peer": "pyg" if peer else "",
                    "times_peer": round(peer["ms"] / found["ms"], 2) if peer else "",
                    "peak_of_peer": round(peaks[method] / peaks["pyg"], 3) if peer else "",
                }
            )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", default=None, help="append the rows to this file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", nargs="+", default=["step", "epoch"], choices=["step", "epoch"])
    parser.add_argument("--graph", nargs="+", default=["synthetic"], help='"synthetic", or data set folders')
    parser.add_argument("--nodes", type=int, default=20_000)
    parser.add_argument("--triples", type=int, default=80_000)
    parser.add_argument("--relations", type=int, default=1_000)
    parser.add_argument("--questions", type=int, default=64, help="of the synthetic graph")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--text-dim", type=int, default=384)
    parser.add_argument("--rows", default="auto", choices=["auto", "dense", "active"], help="as `GNNRetriever.rows`")
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--batches", type=int, default=3, help="batches of part step")
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="float32, or autocast to float16 or bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--without", nargs="*", default=[], help="methods to leave out")
    parser.add_argument("--epoch", nargs="+", default=["ragkit", "pyg"], help="methods of part epoch")
    parser.add_argument("--peaks", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    parser.add_argument("--memory", default=None, help=argparse.SUPPRESS)  # METHOD, in a child
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    relu_dot(
        torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1)
    )  # the first kernel on numba sets PyTorch's threads
    torch.set_num_threads(args.threads)
    if args.memory:
        print(memory_here(args))
        return
    rows: list[dict[str, Any]] = []
    for name in args.graph:
        world = World(name, args)
        for dtype in args.dtype:
            for size in args.batch:
                found = rows_of(args, name, world, dtype, size)
                columns = ["graph", "batch", "dtype", "part", "method", "ms", "cpu_s", "peak_mib"]
                print(show(found, [*columns, "times_peer", "peak_of_peer"]), end="\n\n", flush=True)
                rows += found
    if args.csv:
        append_rows(args.csv, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
