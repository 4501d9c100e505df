"""The shipped world is what its script makes, and what the guides ask of it."""

from __future__ import annotations

import json
import random
import re

import pytest

from ragkit.small_world import path
from ragkit.small_world.build import SEED, write
from ragkit.small_world.synthetic import tables
from ragkit.small_world.templates import KINDS
from ragkit.small_world.world import make_world, normal_form, read_facts


@pytest.fixture(scope="module")
def world():
    return make_world(read_facts(), SEED)


def read(*parts: str):
    return json.loads(path().joinpath(*parts).read_text(encoding="utf-8"))


def test_the_script_makes_the_shipped_files(world, tmp_path):
    write(world, tmp_path)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert made == sorted(p.relative_to(path()) for p in path().rglob("*") if p.is_file())
    for name in made:
        assert (tmp_path / name).read_bytes() == (path() / name).read_bytes(), name


def test_size(world):
    assert 500 <= len(world.passages) <= 800
    assert sum(r["hops"] == 2 for r in world.test) >= 50
    assert len([r for r in world.test if r["hops"] == 1]) >= 500


def test_every_supporting_passage_tells_its_part(world):
    for row in [*world.train, *world.test]:
        assert row["answer"] in world.passages[row["supporting_facts"][-1]]
        assert row["entity"] in world.passages[row["supporting_facts"][0]]
        assert row["hops"] == len(row["supporting_facts"])


def test_no_entity_passage_or_held_out_template_leaks_into_training(world):
    passages = [{k for r in rows for k in r["supporting_facts"]} for rows in (world.train, world.test)]
    entities = [{r["entity"] for r in rows} for rows in (world.train, world.test)]
    assert passages[0].isdisjoint(passages[1])
    assert entities[0].isdisjoint(entities[1])
    assert {r["template"] for r in world.train} == {"seen"}
    held = [q.text for kind in KINDS.values() for f in kind.relations for q in kind.questions(f) if q.held_out]
    patterns = [re.compile(re.escape(t).replace(r"\{e\}", ".+")) for t in held]
    assert not [r["question"] for r in world.train if any(p.fullmatch(r["question"]) for p in patterns)]
    assert {r["template"] for r in world.test} == {"seen", "held_out"}


def test_questions_are_unique_and_ids_name_them(world):
    for rows in (world.train, world.test):
        assert len({r["id"] for r in rows}) == len(rows)
        assert len({r["question"] for r in rows}) == len(rows)


def test_lures_and_same_answer_distractors_exist(world):
    lures = [
        t for t in world.passages.values() if re.search("another page|different article|elsewhere|not discuss", t)
    ]
    assert 0.5 < len(lures) / len(world.passages) < 0.9
    hard = sum(
        any(f" {r['answer']}" in t for k, t in world.passages.items() if k not in r["supporting_facts"])
        for r in world.test
    )
    assert hard > 100


def test_graph_follows_v1(world):
    lines = path().joinpath("processed/stage1/kg.txt").read_text(encoding="utf-8").splitlines()
    assert [tuple(line.split(",")) for line in lines] == world.triples
    entities = {e for h, _, t in world.triples for e in (h, t)}
    for key, names in read("processed", "stage1", "document2entities.json").items():
        assert key in world.passages and set(names) <= entities
    for row in read("processed", "stage1", "test.json"):
        assert set(row["question_entities"]) | set(row["supporting_entities"]) <= entities
    assert all(normal_form(e) == e for e in entities)


def test_another_seed_makes_another_world_from_the_same_facts(world):
    other = make_world(read_facts(), SEED + 1)
    assert other.passages.keys() == world.passages.keys() and other.passages != world.passages


def test_made_tables_have_the_shape_of_the_real_ones():
    made, real = tables(random.Random(0), dict.fromkeys(KINDS, 5)), read_facts()
    assert {k: len(rows) for k, rows in made.items()} == dict.fromkeys(KINDS, 5)
    for kind in KINDS:
        fields = {frozenset(f) for f in [*made[kind].values(), *real[kind].values()]}
        assert fields == {frozenset(KINDS[kind].relations)}
    assert make_world(made, 0).test


def test_a_broken_fact_table_is_named(tmp_path):
    for name, rows in {"countries.tsv": "name\tcapital\nPeru\t\n"}.items():
        (tmp_path / name).write_text(rows, encoding="utf-8")
    with pytest.raises(ValueError, match=r"countries\.tsv, line 2: an empty cell"):
        read_facts(tmp_path)
