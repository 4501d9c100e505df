"""The quick start: its questions, its tables, and the whole round with few steps."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from ragkit import quickstart as qs
from ragkit import small_world
from ragkit.config import QuickstartConfig
from ragkit.evaluation import EvaluationResult
from ragkit.gfm.retriever import GFMRetriever
from ragkit.rag.corpus import Passage
from ragkit.rag.generator import Generator
from ragkit.rag.retriever import DenseRetriever
from ragkit.rag.system import RAGSystem
from ragkit.runs import Run
from ragkit.tuning.qa_data import load_qa


def result(**values):
    """Scores of 40 questions: each metric is 1 for the given share of them."""
    columns = {name: np.arange(40) < share * 40 for name, share in values.items()}
    return EvaluationResult([str(i) for i in range(40)], {k: v.astype(float) for k, v in columns.items()}, seed=0)


def test_the_questions_are_drawn_by_seed_and_share_no_entity():
    config = QuickstartConfig(n_train=200, n_test=100)
    train, test = qs.load_questions(config)
    assert (len(train), len(test)) == (200, 100)
    assert {example.metadata["hops"] for example in [*train, *test]} == {1}
    assert not {e.metadata["entity"] for e in train} & {e.metadata["entity"] for e in test}
    assert {e.metadata["template"] for e in train} == {"seen"}
    again = qs.load_questions(config)
    assert [e.id for e in again[1]] == [e.id for e in test]
    assert [e.id for e in qs.load_questions(QuickstartConfig(n_test=100, seed=1))[1]] != [e.id for e in test]


def test_the_table_shows_the_difference_and_the_controls():
    metrics = {"recall@1": 0.5, "recall@3": 0.8, "recall@5": 0.9, "mrr": 0.6, "em": 0.2, "f1": 0.3}
    scores = {
        qs.BEFORE: result(**metrics),
        qs.AFTER_LSR: result(**{**metrics, "recall@1": 0.7}),
        qs.AFTER: result(**{**metrics, "recall@1": 0.7, "em": 0.6}),
        qs.SHUFFLED: result(**{name: 0.1 for name in metrics if name not in ("em", "f1")}),
        qs.RANDOM: result(em=0.0, f1=0.0),
    }
    head, rule, *rows, note = qs.score_table(scores).splitlines()
    assert "control: shuffled teacher" in head and "control: random passages" in head
    cells = {row.split()[0]: row for row in rows}
    assert list(cells) == list(qs.SHOWN)
    assert "0.500" in cells["recall@1"] and "+0.200 [" in cells["recall@1"] and "] *" in cells["recall@1"]
    assert "+0.400 [" in cells["em"] and cells["em"].rstrip().endswith("0.000")
    assert "*" not in cells["mrr"] and cells["mrr"].count("0.600") == 3
    assert note.startswith("40 test questions")
    without = qs.score_table({label: scores[label] for label in (qs.BEFORE, qs.AFTER_LSR, qs.AFTER)})
    assert "control" not in without


@pytest.fixture
def make_system(tiny_lm, tokenizer, minilm):
    """make_system(dual): a system over a few passages, with one encoder or with two."""

    def make(dual):
        encoders = [copy.deepcopy(minilm) for _ in range(2 if dual else 1)]
        retriever = DenseRetriever(*encoders, device="cpu")
        retriever.index([Passage(f"p{n}", f"Town {n} lies on river {n}.", f"Town {n}") for n in range(6)])
        return RAGSystem(retriever, Generator(tiny_lm, tokenizer=tokenizer, device="cpu"))

    return make


@pytest.mark.parametrize("part", ["query", "both"])
@pytest.mark.parametrize("dual", [True, False])
def test_the_control_starts_untuned_and_leaves_the_tuned_system_alone(tmp_path, make_system, part, dual):
    data = [{"id": f"q{n}", "question": f"Where is town {n}?", "answer": f"on river {n}"} for n in range(6)]
    config = QuickstartConfig(
        rag={"device": "cpu"},
        lsr={"train_part": part, "train": {"max_steps": 2, "batch_size": 3, "learning_rate": 1e-2, "eval_steps": 1}},
    )
    system = make_system(dual)
    retriever, texts = system.retriever, ["Where is town 3?"]
    ids = [f"p{n}" for n in range(6)]

    def state(retriever):
        return (
            retriever.encode_queries(texts),
            retriever.encode_passages(texts),
            retriever.store.embeddings(ids).clone(),
        )

    untuned = state(retriever)
    control = qs.untuned_copy(system, part)
    assert (control.retriever.store is retriever.store) == (part == "query")
    run = Run.create(config, tmp_path)
    result, rows = qs.tune_retriever(system, load_qa(data), config, run, test=load_qa(data))
    assert [event["step"] for event in result.history if "eval_mrr" in event] == [1, 2]
    tuned = state(retriever)
    assert not torch.equal(tuned[0], untuned[0])
    assert torch.equal(tuned[2], untuned[2]) == (part == "query")

    assert all(map(torch.equal, state(control.retriever), untuned))  # it starts where the system started
    assert list(control.retriever.store.passages()) == list(retriever.store.passages())
    assert control.retriever.shared == (not dual)
    qs.tune_retriever(control, load_qa(data), config, run, rows=rows, test=load_qa(data))
    assert not torch.equal(state(control.retriever)[0], untuned[0])
    assert all(map(torch.equal, state(retriever), tuned))


def test_the_generator_is_scored_on_the_way_if_that_is_asked_for(tmp_path, make_system):
    data = load_qa([{"id": f"q{n}", "question": f"Where is town {n}?", "answer": f"on river {n}"} for n in range(6)])
    config = QuickstartConfig(ralt={"train": {"max_steps": 2, "eval_steps": 1}})
    result = qs.tune_generator(make_system(False), data, config, Run.create(config, tmp_path), data)
    assert [event["step"] for event in result.history if "eval_loss" in event] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("controls", [True, False])
def test_the_whole_round_with_few_steps(tmp_path, tiny_lm, tokenizer, monkeypatch, controls):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny_lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    small = tmp_path / "world" / "raw"
    small.mkdir(parents=True)
    for name in ("dataset_corpus", "train", "test"):  # every sixth passage of the small world: seconds, not minutes
        rows = json.loads((small_world.path() / "raw" / f"{name}.json").read_text())
        if name == "dataset_corpus":
            kept = rows = dict(list(rows.items())[::6])
        else:
            rows = [row for row in rows if set(row["supporting_facts"]) <= kept.keys()]
        (small / f"{name}.json").write_text(json.dumps(rows))
    monkeypatch.setattr(qs, "CORPUS", str(tmp_path / "world"))
    config = QuickstartConfig(
        rag={"generator": str(tmp_path / "lm"), "device": "cpu", "max_new_tokens": 4},
        lsr={"train": {"max_steps": 3, "batch_size": 4}},
        ralt={"train": {"max_steps": 3, "batch_size": 4}},
        gfm={"train": {"max_steps": 3}},
        n_graph=5,
        n_train=12,
        n_test=10,
        bootstrap=100,
        controls=controls,
        output_dir=str(tmp_path / "runs"),
    )
    lines = []
    outcome = qs.quickstart(config, lines.append)

    titles = [line for line in lines if line.startswith("[")]
    total = 11 if controls else 9
    assert [title.split("]")[0] for title in titles] == [f"[{n}/{total}" for n in range(1, total + 1)]
    assert len(outcome.seconds) == total
    labels = {qs.BEFORE, qs.AFTER_LSR, qs.AFTER} | ({qs.SHUFFLED, qs.RANDOM} if controls else set())
    assert outcome.scores.keys() == labels and outcome.comparison.labels == [qs.BEFORE, qs.AFTER_LSR, qs.AFTER]
    assert "em" in str(outcome) and "<table>" in outcome._repr_html_()
    assert len(outcome.answers) == 3

    run = Run.open(outcome.run_dir)
    two_hop = {"two-hop: dense", "two-hop: graph"}
    assert json.loads((run.dir / "evaluation.json").read_text()).keys() == labels | two_hop
    assert len(outcome.two_hop.results[1].ids) == 174
    graph = GFMRetriever.load(run.dir / "graph_retriever")
    assert len(graph.retrieve(["Where was Leonhard Euler born?"], 2)[0]) == 2
    assert len(Run.open(run.dir / "gfm").events()) >= 3
    assert "before: mrr" in run.metrics()
    assert len(Run.open(run.dir / "lsr").events()) >= 3 and len(Run.open(run.dir / "ralt").events()) >= 3
    assert (run.dir / "lsr-shuffled").is_dir() == controls

    loaded = qs.RAGSystem.load(outcome.saved)
    questions = [example.question for example, _, _ in outcome.answers]
    assert [a.text for a in loaded.batch_query(questions)] == [after.text for _, _, after in outcome.answers]
    found = loaded.batch_retrieve(questions, 3)
    assert [[p.id for p in row] for row in found] == [[p.id for p in a.passages] for _, _, a in outcome.answers]
