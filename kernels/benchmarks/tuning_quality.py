"""What LSR and RALT bring, and what LSR costs where its teacher cannot answer: before and after, over seeds.

    python kernels/benchmarks/tuning_quality.py small_world --max-train 600 --steps 75
    python kernels/benchmarks/tuning_quality.py ../shared/data/wiki2_mini --tasks lsr --csv tuning_quality.csv

The training questions of a data set train, its test questions are scored, each once before and once after; all with
MiniLM and the shipped tiny LM, which reads the small world only. LSR runs with keep=last (all training questions, the
last step's weights) and with keep=best (a share of them held out; the weights that did best on those, the initial ones
included). RALT trains LoRA adapters on joined passages with the supporting one put in; retrieval is the untuned one.
A row is one metric of one seed, or of the mean over the seeds question by question; intervals are 95 % bootstrap
intervals over the test questions, those of differences are paired. The LM's scores are kept in `--out`, so that only
the first run has to make them.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import append_rows, show, where

from ragkit.config import LSRConfig, RAGConfig, RALTConfig
from ragkit.console import silence_libraries
from ragkit.evaluation import EvaluationResult, compare, evaluate
from ragkit.inputs import Retrieval
from ragkit.intervals import Interval
from ragkit.rag import Generator, RAGSystem
from ragkit.tuning.lsr import LSRTrainer
from ragkit.tuning.qa_data import QAData, load_qa
from ragkit.tuning.ralt import RALTTrainer

RECALL, ANSWERS = ("recall@1", "recall@2", "recall@5"), ("em", "f1")
SHOWN = ("task", "set", "keep", "seed", "kept step", "metric", "before", "after", "difference", "difference 95 %")


def questions(source: str, split: str, most: int | None) -> QAData:
    """The questions of a split, at most `most`, drawn with seed 0; of the small world its one-hop ones."""
    found = [e for e in load_qa(source, split=split) if not e.metadata.get("sub_question")]
    if source == "small_world":
        found = [e for e in found if e.metadata.get("hops", 1) == 1]
    if most is not None and most < len(found):
        found = random.Random(0).sample(found, most)
    return QAData(found, source)


def span(value: Interval) -> str:
    """An interval in a cell."""
    return f"{value.low:.3f}..{value.high:.3f}"


def rows_of(
    facts: dict[str, Any], metrics: Sequence[str], before: EvaluationResult, after: EvaluationResult
) -> list[dict[str, Any]]:
    """One row a metric."""
    change = compare(before, after).difference
    return [
        {
            **facts,
            "metric": name,
            "before": round(before[name], 4),
            "before 95 %": span(before.metrics[name]),
            "after": round(after[name], 4),
            "after 95 %": span(after.metrics[name]),
            "difference": round(change[name].mean, 4),
            "difference 95 %": span(change[name]),
        }
        for name in metrics
    ]


def pooled(results: Sequence[EvaluationResult]) -> EvaluationResult:
    """Each question's mean over the seeds."""
    first = results[0]
    assert all(result.ids == first.ids for result in results)
    return EvaluationResult(first.ids, {n: np.mean([r.values[n] for r in results], axis=0) for n in first.values})


def run_lsr(args: argparse.Namespace, system: RAGSystem, train: QAData, test: QAData, facts: dict[str, Any]) -> list:
    """The rows of LSR."""
    untuned, rows = system.retriever, []
    before = evaluate(Retrieval(untuned), test, ks=(1, 2, 5), generate=False)
    for keep in args.keep:
        results, kept, begin = [], [], time.perf_counter()
        for seed in args.seeds:
            # The index is shared: only the query encoder is trained, and that is a copy which LSR makes itself.
            system.retriever = copy.copy(untuned)
            config = LSRConfig(
                keep=keep,
                valid_share=args.valid_share,
                score_cache=str(Path(args.out) / "lm_scores"),
                output_dir=args.out,
                train={
                    "max_steps": args.steps,
                    "batch_size": args.batch_size,
                    "learning_rate": args.lsr_rate,
                    "seed": seed,
                    "save_steps": None,
                },
            )
            trainer = LSRTrainer(system, train, config)
            result = trainer.train()
            results.append(evaluate(Retrieval(system.retriever), test, ks=(1, 2, 5), generate=False))
            kept.append(result.steps if result.kept is None else result.kept.step)
            held = len(trainer.held_out)
            row = {**facts, "task": "LSR", "keep": keep, "train": len(trainer.rows()), "held out": held}
            row |= {"steps": result.steps, "rate": args.lsr_rate}
            rows += rows_of({**row, "seed": seed, "kept step": kept[-1], "s": round(result.metrics["seconds"], 1)},
                            RECALL, before, results[-1])  # fmt: skip
        row |= {"seed": "mean", "kept step": "", "s": round(time.perf_counter() - begin, 1)}
        rows += rows_of(row, RECALL, before, pooled(results))
    system.retriever = untuned
    return rows


def run_ralt(args: argparse.Namespace, system: RAGSystem, train: QAData, test: QAData, facts: dict[str, Any]) -> list:
    """The rows of RALT."""
    untuned, rows, results, begin = system.generator, [], [], time.perf_counter()
    before = evaluate(system, test, retrieve=False)
    for seed in args.seeds:
        system.generator = Generator("default", device="cpu", max_new_tokens=system.config.max_new_tokens)
        config = RALTConfig(
            context="joined",
            add_gold=True,
            output_dir=args.out,
            train={
                "max_steps": args.ralt_steps,
                "batch_size": 8,
                "learning_rate": args.ralt_rate,
                "seed": seed,
                "save_steps": None,
            },
        )
        trainer = RALTTrainer(system, train, config)
        result = trainer.train()
        results.append(evaluate(system, test, retrieve=False))
        row = {**facts, "task": "RALT", "keep": "last", "train": len(trainer.rows()), "held out": 0}
        row |= {"steps": result.steps, "rate": args.ralt_rate}
        rows += rows_of({**row, "seed": seed, "kept step": result.steps, "s": round(result.metrics["seconds"], 1)},
                        ANSWERS, before, results[-1])  # fmt: skip
    row |= {"seed": "mean", "kept step": "", "s": round(time.perf_counter() - begin, 1)}
    rows += rows_of(row, ANSWERS, before, pooled(results))
    system.generator = untuned
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help='"small_world", or the folder of a data set')
    parser.add_argument("--tasks", nargs="+", default=["lsr", "ralt"], choices=["lsr", "ralt"])
    parser.add_argument("--keep", nargs="+", default=["last", "best"], choices=["last", "best"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=25, help="of LSR")
    parser.add_argument("--batch-size", type=int, default=16, help="of LSR")
    parser.add_argument("--lsr-rate", type=float, default=2e-5)
    parser.add_argument("--valid-share", type=float, default=None, help="held out with keep=best; none: the default")
    parser.add_argument("--ralt-steps", type=int, default=100)
    parser.add_argument("--ralt-rate", type=float, default=3e-3)
    parser.add_argument("--max-train", type=int, default=None, help="training questions, drawn with seed 0")
    parser.add_argument("--max-test", type=int, default=None)
    parser.add_argument("--out", default="runs/tuning_quality")
    parser.add_argument("--csv", default=None)
    args = parser.parse_args(argv)
    silence_libraries()
    train, test = (questions(args.source, s, m) for s, m in (("train", args.max_train), ("test", args.max_test)))
    system = RAGSystem.from_documents(args.source, RAGConfig(device="cpu"))
    facts = {**where("cpu"), "task": "", "set": Path(args.source).name, "keep": "", "train": 0, "held out": 0}
    facts |= {"test": len(test), "steps": 0, "rate": 0.0, "seed": "", "kept step": "", "s": 0.0}
    rows: list[dict[str, Any]] = []
    for task in args.tasks:
        rows += (run_lsr if task == "lsr" else run_ralt)(args, system, train, test, facts)
    if args.csv:
        append_rows(args.csv, rows)
    print(show(rows, SHOWN))


if __name__ == "__main__":
    main(sys.argv[1:])
