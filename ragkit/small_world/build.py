"""Writes the small world's package data: `python -m ragkit.small_world.build`.

The layout is GFM-RAG v1's: `raw/dataset_corpus.json`, `raw/{train,test}.json`, `processed/stage1/kg.txt`
(`head,relation,tail`), `processed/stage1/document2entities.json`, `processed/stage1/{train,test}.json`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from ragkit.files import atomic_write_json, atomic_write_text
from ragkit.small_world import path
from ragkit.small_world.world import Row, World, make_world, normal_form, read_facts

SEED = 0


def _with_entities(world: World, row: Row) -> Row:
    """v1's stage-1 row: the raw one with question entities and supporting entities."""
    supporting = dict.fromkeys(e for key in row["supporting_facts"] for e in world.document2entities[key])
    return {**row, "question_entities": [normal_form(row["entity"])], "supporting_entities": list(supporting)}


def write(world: World, folder: Path) -> dict[str, int | dict[str, int]]:
    """Writes `world` to `folder` and returns (and writes, as `stats.json`) its counts."""
    raw, stage1 = folder / "raw", folder / "processed" / "stage1"
    atomic_write_json(raw / "dataset_corpus.json", world.passages)
    atomic_write_text(stage1 / "kg.txt", "".join(f"{h},{r},{t}\n" for h, r, t in world.triples))
    atomic_write_json(stage1 / "document2entities.json", world.document2entities)
    for name, rows in (("train", world.train), ("test", world.test)):
        atomic_write_json(raw / f"{name}.json", rows)
        atomic_write_json(stage1 / f"{name}.json", [_with_entities(world, r) for r in rows])
    stats: dict[str, int | dict[str, int]] = {
        "passages": len(world.passages),
        "entities": len({e for h, _, t in world.triples for e in (h, t)}),
        "relations": len({r for _, r, _ in world.triples}),
        "triples": len(world.triples),
        "train": dict(Counter(f"{r['hops']}-hop" for r in world.train)),
        "test": dict(Counter(f"{r['hops']}-hop, {r['template']} template" for r in world.test)),
    }
    atomic_write_json(folder / "stats.json", stats)
    return stats


def main() -> None:
    """Builds the shipped world from the shipped fact tables."""
    print(json.dumps(write(make_world(read_facts(), SEED), path()), indent=1))


if __name__ == "__main__":
    main()
