"""Reading, laying out and caching a large synthetic graph, each in a process of its own.

    python kernels/benchmarks/graph_scale.py [--entities 5000000] [--triples 15000000] [--relations 1000] [--csv FILE]

Writes a kg.txt into a scratch folder (deleted at the end), loads it with `cache=True` (parse, layout, write the copy),
then loads it once more from the copy. Peak memory is the largest resident set of each process, memory-mapped pages
included. Prints both rows and adds them to the CSV. Targets at the default size: 180 s and 16384 MiB, then 10 s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import append_rows, commit, cpu_name, highest_resident_mib

TARGETS = {"first load": (180.0, 16384.0), "second load": (10.0, 16384.0)}


def write(path: Path, entities: int, triples: int, relations: int) -> None:
    """Every entity is the head of one triple at least; other ends, and relations, are drawn with a cubic skew."""
    from ragkit.graph.kg_text import write_kg_text
    from ragkit.graph.names import Names

    rng = np.random.default_rng(0)

    def skewed(count: int, size: int) -> np.ndarray:
        return (size * rng.random(count) ** 3).astype(np.int32)

    head = np.concatenate([rng.permutation(entities).astype(np.int32), skewed(triples - entities, entities)])
    head = head[rng.permutation(triples)]
    entity_names = Names((f"entity {number:07d} of the graph" for number in range(entities)), "entity")
    relation_names = Names((f"relation {number}" for number in range(relations)), "relation")
    with path.open("wb") as file:
        write_kg_text(file, entity_names, relation_names, head, skewed(triples, relations), skewed(triples, entities))


def child(folder: Path) -> None:
    """One load; prints what it took as JSON."""
    start, cpu = time.perf_counter(), time.process_time()
    from ragkit.graph import KnowledgeGraph

    graph = KnowledgeGraph.load(folder, cache=True)
    layout = graph.layout
    seconds = time.perf_counter() - start
    found = {
        "entities": graph.num_entities,
        "triples": graph.num_triples,
        "relations": graph.num_relations,
        "edges": layout.num_edges,
        "cached": graph.report.cached,
        "fingerprint": graph.fingerprint,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_mib": round(highest_resident_mib()),
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--entities", type=int, default=5_000_000)
    parser.add_argument("--triples", type=int, default=15_000_000)
    parser.add_argument("--relations", type=int, default=1000)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--scratch", type=Path, help="where to put the scratch folder (default: the system's)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        stage1 = Path(scratch) / "processed" / "stage1"
        stage1.mkdir(parents=True)
        write(stage1 / "kg.txt", args.entities, args.triples, args.relations)
        size = (stage1 / "kg.txt").stat().st_size / 2**20
        found = []
        for step in TARGETS:
            command = [sys.executable, __file__, "--child", scratch]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            rows.append(
                {
                    "device": cpu_name(),
                    "cores": os.cpu_count(),
                    **{name: found[-1][name] for name in ("entities", "triples", "relations")},
                    "file_mib": round(size),
                    "commit": commit(),
                    "step": step,
                    **{name: found[-1][name] for name in ("seconds", "cpu_seconds", "peak_mib")},
                }
            )
            limit, memory = TARGETS[step]
            print(
                f"{step}: {found[-1]['seconds']} s (target {limit:g} s at full size), "
                f"{found[-1]['cpu_seconds']} CPU s, peak {found[-1]['peak_mib']} MiB (target {memory:g})"
            )
    if found[0]["cached"] or not found[1]["cached"] or found[0]["fingerprint"] != found[1]["fingerprint"]:
        raise SystemExit("the second load did not come from the first one's copy, or differs from it")
    if (found[0]["entities"], found[0]["triples"]) != (args.entities, args.triples):
        raise SystemExit(f"the graph came back with {found[0]['entities']} entities and {found[0]['triples']} triples")
    append_rows(args.csv, rows)


if __name__ == "__main__":
    main()
