"""How well a fine-tuned GFM retrieves on real questions, against PageRank, a dense retriever, and both together.

    python kernels/benchmarks/gfm_quality.py ../shared/data --sets wiki2_mini hotpot_mini musique_plus \
        --seeds 0 1 2 --losses both --epochs 6 --out runs/quality --csv kernels/benchmarks/gfm_quality.csv

For each seed one model is trained on the train questions of all `--sets` together (`--apart`: one model for each set)
with `GFMFinetuneTrainer`, that is what `python -m ragkit gfm-finetune` runs. Model selection (the epoch, the ranker,
the weight of the fusion) uses a part of the train questions; the test questions are scored once, at the end. `ppr` is
personalised PageRank from the same question entities as the GFM's (damping 0.5, undirected, passages summed with
1/df), `dense` the MiniLM encoder; the hybrid is log(share of the GFM's score) + weight x cosine.

Losses: "v1" 0.3 BCE + 0.7 ListCE on entities, "documents" ListCE on document scores, "both" their sum.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import append_rows, show, where

from ragkit.config import GFMFinetuneConfig
from ragkit.evaluation import EvaluationResult, compare, retrieval_values
from ragkit.gfm.datasets import FinetuneData, GraphQuestions, load_finetune_data
from ragkit.gfm.evaluate import scoring
from ragkit.gfm.finetune import GFMFinetuneTrainer
from ragkit.gfm.rankers import RANKERS, Incidence, entity_weights
from ragkit.gfm.text_encoder import open_encoder
from ragkit.gfm.training import best_of
from ragkit.intervals import interval
from ragkit.rag.corpus import load_corpus
from ragkit.rag.encoder import Encoder

KS = (2, 5, 10)
RANKER_NAMES = ("idf_topk", "score_weighted_idf")
WEIGHTS = (1, 2, 4, 6, 8, 12, 16)  # of the cosine beside the logarithm of the GFM's share
FLOOR = 1e-4
LOSSES: dict[str, list[dict[str, Any]]] = {
    "v1": [{"name": "bce", "weight": 0.3}, {"name": "listce", "weight": 0.7}],
    "documents": [{"name": "listce", "weight": 1.0, "is_doc_loss": True}],
}
LOSSES["both"] = LOSSES["v1"] + LOSSES["documents"]


def fused(graph: np.ndarray, cosines: np.ndarray, weight: float) -> np.ndarray:
    """[Q, docs] log(share of the GFM's score + 1e-4) + weight x cosine: what `HybridRetriever` calls "loglinear"."""
    return np.log(graph / np.maximum(graph.sum(1, keepdims=True), 1e-9) + FLOOR) + weight * cosines


def page_rank(part: GraphQuestions, damping: float = 0.5, steps: int = 30) -> np.ndarray:
    """[Q, docs] personalised PageRank summed to passages with 1/df, as ../shared/data/baselines.py describes it."""
    from scipy import sparse

    graph = part.graph
    N = graph.num_entities
    rows, columns = np.concatenate([graph.head, graph.tail]), np.concatenate([graph.tail, graph.head])
    A = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(N, N))
    A.data[:] = 1
    walk = (sparse.diags(1 / np.maximum(1, np.asarray(A.sum(1)).ravel())) @ A).T.tocsr()
    docs = sparse.csr_matrix(
        (np.ones(len(graph.document_entities)), graph.document_entities, graph.document_ptr),
        shape=(graph.num_documents, N),
    )
    df = np.maximum(1, graph.document_frequency)
    found = []
    for ids in (part.questions.question_entities[i].numpy() for i in range(len(part.questions))):
        start = np.zeros(N)
        start[ids] = 1 / df[ids]
        start /= start.sum()
        x = start.copy()
        for _ in range(steps):
            x = (1 - damping) * start + damping * (walk @ x)
        found.append(docs @ (x / df))
    return np.stack(found)


def dense(part: GraphQuestions, folder: str, encoder: Encoder, kept: Path) -> np.ndarray:
    """[Q, docs] cosines of MiniLM in the order of the graph's documents; 160 tokens of title and text."""
    path = kept / f"passages-{part.name}.npy"
    texts = {p.id: p.full_text for p in load_corpus(folder)}
    if path.is_file():
        passages = np.load(path)
    else:
        passages = encoder.encode([texts[name] for name in part.graph.documents], "passage").numpy()
        np.save(path, passages)
    return encoder.encode(part.questions.questions, "query").numpy() @ passages.T


def gfm_scores(model: Any, part: GraphQuestions, batch: int) -> dict[str, np.ndarray]:
    """[Q, docs] of each ranker."""
    incidence, weights = Incidence.of(part.graph), entity_weights(part.graph)
    found: dict[str, list[np.ndarray]] = {name: [] for name in RANKER_NAMES}
    with scoring(model):
        for b in part.questions.batches(batch):
            logits = model(part.graph, b.embeddings, b.question_entities, weights)
            for name in RANKER_NAMES:
                found[name].append(RANKERS[name](logits, incidence).numpy())
    return {name: np.concatenate(rows) for name, rows in found.items()}


def result(part: GraphQuestions, scores: np.ndarray) -> EvaluationResult:
    """Recall and all at the cut-offs; equal scores in the order of ids, as the rankers break ties."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, : max(KS)]
    names = [[part.graph.documents[int(i)] for i in row] for row in order]
    gold = [
        {part.graph.documents[int(i)] for i in part.questions.supporting_documents[q]}
        for q in range(len(part.questions))
    ]
    values = retrieval_values(names, gold, KS)
    return EvaluationResult(part.questions.ids, values)


def choose(found: list[tuple[GraphQuestions, dict[str, np.ndarray], np.ndarray]]) -> tuple[str, float]:
    """(ranker, weight of the cosine) with the best mean of recall@2 + recall@5 over the validation sets.

    Args:
        found: For each set its questions, the GFM's scores by ranker, and the cosines.
    """

    def value(make: Any) -> float:
        results = [result(part, make(scores, cosines)) for part, scores, cosines in found]
        return float(np.mean([r["recall@2"] + r["recall@5"] for r in results]))

    ranker = max(RANKER_NAMES, key=lambda name: value(lambda scores, _: scores[name]))
    return ranker, max(WEIGHTS, key=lambda w: value(lambda scores, cosines: fused(scores[ranker], cosines, w)))


def settings(args: argparse.Namespace, sets: Sequence[str], seed: int) -> GFMFinetuneConfig:
    """The run's settings, as the command would read them."""
    return GFMFinetuneConfig(
        seed=seed,
        datasets={
            "root": args.root,
            "train_names": list(sets),
            "valid_share": args.valid_share,
            "link": args.link,
            "top_facts": args.top_facts,
            "sub_questions": not args.whole,
        },
        model={"entity_model": {"input_dim": args.dim, "hidden_dims": [args.dim] * args.layers}},
        task={"losses": LOSSES[args.losses], "ks": [1, 2, 5, 10]},
        doc_ranker={"name": "score_weighted_idf"},
        optimizer={"lr": args.lr},
        train={
            "batch_size": args.batch_size,
            "num_epoch": args.epochs,
            "checkpoint": args.checkpoint,
            "schedule": args.schedule,
            "warmup_steps": args.warmup,
            "save_steps": 10**9,
            "num_threads": torch.get_num_threads(),
        },
        output_dir=args.out,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder of the data sets")
    parser.add_argument("--sets", nargs="+", default=["wiki2_mini", "hotpot_mini", "musique_plus"])
    parser.add_argument("--apart", action="store_true", help="one model for each data set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--schedule", default="constant")
    parser.add_argument("--warmup", type=float, default=0)
    parser.add_argument("--losses", choices=sorted(LOSSES), default="both")
    parser.add_argument("--checkpoint", default=None, help="weights to start from; {seed} stands for the seed")
    parser.add_argument("--valid-share", type=float, default=0.15)
    parser.add_argument("--link", default="given", choices=["given", "names", "facts"], help="question entities")
    parser.add_argument("--top-facts", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="train on whole questions only, not on their parts")
    parser.add_argument("--label", default=None, help="name of this setting in the table")
    parser.add_argument("--no-test", action="store_true", help="only the validation questions: for trying settings")
    parser.add_argument("--out", default="runs/quality")
    parser.add_argument("--csv", default=None)
    args = parser.parse_args(argv)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    label = args.label or f"{args.layers}x{args.dim} {args.losses} {args.link}"
    template = args.checkpoint
    rows: list[dict[str, Any]] = []
    values: dict[tuple[str, str, str], list[EvaluationResult]] = {}  # (set, split, method) -> one a seed
    fixed: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # PageRank and cosines, which no seed changes
    for seed in args.seeds:
        args.checkpoint = template.format(seed=seed) if template else None
        for sets in [[name] for name in args.sets] if args.apart else [args.sets]:
            config = settings(args, sets, seed)
            encoder = open_encoder(config.text_emb_model, "cpu")
            data: FinetuneData = load_finetune_data(config.datasets, encoder, seed, tests=True)
            begin = time.perf_counter()
            trainer = GFMFinetuneTrainer(config, data=data, encoder=encoder)
            outcome = trainer.train()
            assert trainer.run is not None
            print(f"seed {seed}, {' '.join(sets)}: {outcome.steps} steps, {time.perf_counter() - begin:.0f} s, best "
                  f"{best_of(trainer.run)}", flush=True)  # fmt: skip
            chosen: tuple[str, float] | None = None
            for split in ("valid",) if args.no_test else ("valid", "test"):
                found = []
                for name, part in getattr(data, split).items():
                    key = f"{name}/{split}" if split == "test" else f"{name}/{split}{seed}"
                    if key not in fixed:
                        folder = str(Path(args.root) / name)
                        fixed[key] = (page_rank(part), dense(part, folder, encoder.encoder, Path(args.out)))
                    found.append((part, gfm_scores(trainer.model, part, args.batch_size), fixed[key][1]))
                if chosen is None:
                    chosen = choose(found)
                    print(f"  chosen on the validation questions: {chosen}", flush=True)
                ranker, weight = chosen
                for part, scores, cosines in found:
                    ppr = fixed[f"{part.name}/{split}" if split == "test" else f"{part.name}/{split}{seed}"][0]
                    methods = {f"gfm {r}": scores[r] for r in RANKER_NAMES} | {
                        "gfm": scores[ranker],
                        "dense": cosines,
                        "ppr": ppr,
                        "hybrid": fused(scores[ranker], cosines, weight),
                    }
                    for method, s in methods.items():
                        values.setdefault((part.name, split, method), []).append(result(part, s))
    for (name, split, method), results in values.items():
        seeds = results[:1] if method in ("ppr", "dense") and split == "test" else results
        row = {**where("cpu"), "setting": label, "set": name, "split": split, "method": method, "seeds": len(seeds)}
        row["questions"] = len(seeds[0].ids)
        for metric in ("recall@2", "recall@5", "recall@10", "all@5"):
            means = [r[metric] for r in seeds]
            row[metric] = round(float(np.mean(means)), 4)
            if metric not in ("recall@2", "recall@5"):
                continue
            row[f"{metric} 95 %"] = row[f"{metric} seeds"] = ""
            if split == "test":
                pooled = np.mean([r.values[metric] for r in seeds], axis=0)  # each question's mean over the seeds
                found = interval(pooled)
                row[f"{metric} 95 %"] = f"{found.low:.3f}..{found.high:.3f}"
                row[f"{metric} seeds"] = " ".join(f"{m:.3f}" for m in means)
        rows.append(row)
    columns = [
        "set",
        "split",
        "method",
        "questions",
        "recall@2",
        "recall@2 95 %",
        "recall@5",
        "recall@5 95 %",
        "recall@10",
    ]
    columns += ["recall@2 seeds", "recall@5 seeds"]
    print(show([{c: row.get(c, "") for c in columns} for row in rows], columns))
    for name in dict.fromkeys(key[0] for key in values):
        for first, second in (("ppr", "gfm"), ("dense", "hybrid"), ("gfm", "hybrid")):
            if (name, "test", first) in values:
                for seed, (a, b) in enumerate(
                    zip(values[(name, "test", first)], values[(name, "test", second)], strict=True)
                ):
                    change = compare(a, b).difference
                    print(f"{name}, seed {args.seeds[seed]}: {second} - {first}: " + ", ".join(
                        f"{m} {change[m].mean:+.3f} [{change[m].low:+.3f}, {change[m].high:+.3f}]"
                        for m in ("recall@2", "recall@5")))  # fmt: skip
    (Path(args.out) / f"{label.replace(' ', '-')}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if args.csv:
        append_rows(args.csv, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
