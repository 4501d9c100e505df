"""The small world itself: from fact tables to passages, questions and a knowledge graph."""

from __future__ import annotations

import csv
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragkit.small_world.templates import BRIDGES, KINDS, Fields, write_passage

FILES = {"country": "countries.tsv", "person": "people.tsv", "company": "companies.tsv", "book": "books.tsv"}
TEST_SHARE = 0.4  # of the countries; what is linked to a country shares its split
Tables = dict[str, dict[str, Fields]]
Row = dict[str, Any]


@dataclass
class World:
    """Passages, questions and triples.

    Attributes:
        passages: Key ("Peru", "Peru [2]", ...) -> text, in the order of the entities.
        train: Question rows about training entities, with templates that are not held out.
        test: Question rows about test entities; `template` says whether tuning questions show the template.
        triples: (head, relation, tail) in GFM-RAG v1's normal form, first seen first.
        document2entities: Key -> the entities that the passage tells of, in normal form.
    """

    passages: dict[str, str] = field(default_factory=dict)
    train: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)
    triples: list[tuple[str, str, str]] = field(default_factory=list)
    document2entities: dict[str, list[str]] = field(default_factory=dict)


def normal_form(text: str) -> str:
    """GFM-RAG v1's name normalisation."""
    return re.sub("[^A-Za-z0-9 ]", " ", text.lower()).strip()


def read_facts(folder: Path | None = None) -> Tables:
    """The checked fact tables: kind -> entity -> fields.

    Raises:
        ValueError: A row has an empty cell or a second row has the same name (file and line are named).
    """
    folder = folder or Path(__file__).parent / "facts"
    out: Tables = {}
    for kind, file in FILES.items():
        rows: dict[str, Fields] = {}
        with (folder / file).open(encoding="utf-8", newline="") as handle:
            for line, row in enumerate(csv.DictReader(handle, delimiter="\t"), start=2):
                key = row.pop(next(iter(row)))  # the first column: name or title
                if not key or not all(row.values()):
                    raise ValueError(f"{file}, line {line}: an empty cell")
                if key in rows:
                    raise ValueError(f"{file}, line {line}: {key!r} stands in the table twice")
                rows[key] = dict(row)
        out[kind] = rows
    return out


def split_entities(tables: Tables, rng: random.Random) -> dict[str, str]:
    """Entity -> "train" or "test", so that linked entities share a split and no passage serves both."""
    countries = list(tables["country"])
    rng.shuffle(countries)
    test = set(countries[: round(len(countries) * TEST_SHARE)])
    split = {name: "test" if name in test else "train" for name in countries}

    def follow(name: str, link: str) -> None:
        split[name] = split.get(link) or ("test" if rng.random() < TEST_SHARE else "train")

    for person, fields in tables["person"].items():
        follow(person, fields["birth_country"])
    for company, fields in tables["company"].items():
        follow(company, fields["country"])
    for book, fields in tables["book"].items():
        follow(book, fields["author"])
    return split


def make_world(tables: Tables, seed: int = 0, lure: float = 0.7) -> World:
    """Writes the passages, asks the questions and draws the graph.

    Args:
        tables: Kind -> entity -> fields, as `read_facts` gives.
        seed: Fixes every choice.
        lure: Probability that a passage names a topic which only another passage tells.
    """
    rng = random.Random(seed)
    split = split_entities(tables, rng)
    world = World()
    home: dict[tuple[str, int], str] = {}  # (entity, facet) -> key of its passage
    order = [(kind, name) for kind in KINDS for name in tables[kind]]
    rng.shuffle(order)
    for kind, name in order:
        fields = tables[kind][name]
        for facet in range(len(KINDS[kind].facets)):
            other = rng.choice([n for n in tables[kind] if n != name])
            key = name if facet == 0 else f"{name} [{facet + 1}]"
            home[name, facet] = key
            world.passages[key] = write_passage(rng, kind, name, fields, facet, other, lure)
            _draw(world, kind, name, fields, facet, key)
    _one_hop(world, tables, split, home, order)
    _two_hop(world, tables, split, home, order)
    for rows, label in ((world.train, "train"), (world.test, "test")):
        rng.shuffle(rows)
        for number, row in enumerate(rows):
            row["id"] = f"{label}-{number:04d}"
    return world


def _draw(world: World, kind: str, name: str, fields: Fields, facet: int, key: str) -> None:
    told = KINDS[kind].facets[facet]
    head = normal_form(name)
    world.document2entities[key] = list(dict.fromkeys([head, *(normal_form(fields[f]) for f in told)]))
    for f in told:
        topic = KINDS[kind].relations[f].topic
        triple = (head, topic, normal_form(fields[f]))
        if triple not in world.triples:
            world.triples.append(triple)


def _add(world: World, split: str, held_out: bool, row: Row) -> None:
    if split == "test":
        world.test.append(row)
    elif not held_out:
        world.train.append(row)


def _row(question: str, answer: str, gold: list[str], name: str, hops: int, kind: str, style: str, held: bool) -> Row:
    return {
        "id": "",
        "question": question,
        "answer": answer,
        "supporting_facts": gold,
        "hops": hops,
        "type": kind,
        "style": style,
        "template": "held_out" if held else "seen",
        "entity": name,
    }


def _one_hop(world: World, tables: Tables, split: dict, home: dict, order: list) -> None:
    for kind, name in order:
        for f in KINDS[kind].relations:
            gold = home[name, KINDS[kind].facet_of(f)]
            for q in KINDS[kind].questions(f):
                row = _row(
                    q.text.format(e=name), tables[kind][name][f], [gold], name, 1, f"{kind}.{f}", q.style, q.held_out
                )
                _add(world, split[name], q.held_out, row)


def _two_hop(world: World, tables: Tables, split: dict, home: dict, order: list) -> None:
    for kind, name in order:
        for bridge in BRIDGES:
            if bridge.kind != kind:
                continue
            middle = tables[kind][name][bridge.link]
            if middle not in tables[bridge.target]:
                continue
            answer = tables[bridge.target][middle][bridge.field]
            gold = [
                home[name, KINDS[kind].facet_of(bridge.link)],
                home[middle, KINDS[bridge.target].facet_of(bridge.field)],
            ]
            row = _row(
                bridge.text.format(e=name),
                answer,
                gold,
                name,
                2,
                f"{kind}.{bridge.target}.{bridge.field}",
                "bridge",
                False,
            )
            _add(world, split[name], False, row)
