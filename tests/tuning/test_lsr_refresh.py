"""Candidates that are retrieved anew while LSR trains: they change, they are kept, and a resumed run has the same."""

from __future__ import annotations

import gc
import json
import shutil
import signal
from pathlib import Path

import lsr_job as job
import pytest
import torch

from ragkit.config import RALTConfig
from ragkit.rag import retriever as retriever_module
from ragkit.run_opening import OtherSettingsWarning, open_run
from ragkit.runs import Run, RunError
from ragkit.tuning.candidates import Candidates
from ragkit.tuning.qa_data import DataError, load_qa
from ragkit.tuning.refresh import refresh_rows
from ragkit.tuning.teacher import build_rows, teacher_scores

JOB = Path(job.__file__)
pytestmark = pytest.mark.filterwarnings("ignore::ragkit.tuning.lsr_table.TeacherWarning")


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """The engine collects garbage at each start: half a second over all that was imported, which is set aside here."""
    gc.freeze()
    yield
    gc.unfreeze()


def curve(run):
    """The events without the clock."""
    return [{k: v for k, v in event.items() if k not in ("elapsed", "remaining")} for event in run.events()]


def assert_as(trainer, unbroken):
    """The same curve, weights, index and candidates, bit for bit."""
    assert curve(trainer.run) == curve(unbroken.run)
    found, expected = trainer.system.retriever, unbroken.system.retriever
    for part in ("question_encoder", "encoder"):
        for name, tensor in getattr(expected, part).state_dict().items():
            assert torch.equal(getattr(found, part).state_dict()[name], tensor), (part, name)
    ids = [passage.id for passage in expected.passages]
    assert torch.equal(found.store.embeddings(ids), expected.store.embeddings(ids))
    assert trainer.rows() == unbroken.rows()
    for step in (3, 6):
        path = Path("refreshed", f"step-{step}", "rows.json")
        assert (trainer.run.dir / path).read_bytes() == (unbroken.run.dir / path).read_bytes()


@pytest.fixture(scope="module", params=["query", "both"])
def part(request):
    return request.param


@pytest.fixture(scope="module")
def unbroken(part, tmp_path_factory):
    trainer = job.make_trainer(job.settings(tmp_path_factory.mktemp("whole"), "whole", train_part=part))
    trainer.train()
    return trainer


def kept(run, step):
    saved = json.loads((run.dir / "refreshed" / f"step-{step}" / "rows.json").read_text())
    return {row["id"]: row["passage_ids"] for row in saved["rows"]}


def test_the_candidates_are_what_the_encoder_finds_at_that_step(part, unbroken, tmp_path):
    assert sorted(path.name for path in (unbroken.run.dir / "refreshed").iterdir()) == ["step-3", "step-6"]
    first = json.loads((unbroken.run.dir / "lm_scores" / "rows.json").read_text())["rows"]
    at3, at6 = kept(unbroken.run, 3), kept(unbroken.run, 6)
    assert {row["id"]: row["passage_ids"] for row in first} != at3 != at6
    assert unbroken.system.retriever.built == {"query": 1, "both": 4}[part]  # at first, twice between, at the end
    # A training that ends at step 3 has the weights that were asked at step 3.
    train = {"schedule": "constant"}
    three = {"max_steps": 3, **train}
    short = job.make_trainer(job.settings(tmp_path, "short", train_part=part, refresh_steps=None, train=three))
    long = job.make_trainer(job.settings(tmp_path, "long", train_part=part, train=train))
    short.train()
    long.train()
    texts = [row["question"] for row in job.questions()]
    found = short.system.retriever.retrieve(texts, 4)
    assert kept(long.run, 3) == {
        row["id"]: [p.id for p in row_found] for row, row_found in zip(job.questions(), found, strict=True)
    }
    assert curve(long.run)[:3] == [{**event, "total": 9} for event in curve(short.run)]


def test_each_step_uses_the_rows_in_force(part, tmp_path):
    """The data loader has read a batch ahead when the rows change; the loss must see the new ones all the same."""
    trainer = job.make_trainer(job.settings(tmp_path, train_part=part))
    retriever, seen = trainer.system.retriever, []
    score = retriever.score

    def watched(questions, passage_ids, part):
        seen.append(dict(zip(questions, passage_ids, strict=True)))
        return score(questions, passage_ids, part)

    retriever.score = watched
    trainer.train()
    names = {row["question"]: row["id"] for row in job.questions()}
    at3, at6 = kept(trainer.run, 3), kept(trainer.run, 6)
    assert len(seen) == 9
    for step, batch in enumerate(seen):
        if step >= 3:
            expected = at3 if step < 6 else at6
            assert {names[q]: list(ids) for q, ids in batch.items()} == {names[q]: expected[names[q]] for q in batch}


def test_scores_of_refreshed_rows_are_those_of_scoring_them_at_once(unbroken):
    config = unbroken.config.model_copy(update={"score_cache": None})
    by_id = {passage.id: passage for passage in unbroken.system.retriever.passages}
    examples = {example.id: example for example in unbroken.data}
    rows = unbroken.rows()
    pairs = [(examples[row.id], [by_id[p] for p in row.passage_ids]) for row in rows]
    for row, values in zip(rows, teacher_scores(unbroken.system.generator, pairs, config, "lm"), strict=True):
        assert row.lm_scores == pytest.approx(values, abs=1e-5)


def test_only_new_pairs_are_scored(tmp_path, monkeypatch, capsys):
    system, data = job.make_system(), load_qa(job.questions())
    config = job.settings(tmp_path, score_cache=None)
    rows, _ = build_rows(system, data, config)
    asked = []
    ask = system.generator.sequence_logprob
    counted = lambda prompts, *a, **k: asked.append(len(prompts)) or ask(prompts, *a, **k)  # noqa: E731
    monkeypatch.setattr(system.generator, "sequence_logprob", counted)
    assert refresh_rows(system, data, rows, config, "lm") == rows and asked == []
    assert "0 of 96 are new, 0 pairs were scored" in capsys.readouterr().out
    with torch.no_grad():
        system.retriever.encoder.mix.weight.add_(torch.randn(12, 12))
    system.retriever.refresh()
    new = refresh_rows(system, data, rows, config, "lm")
    fresh = sum(len(set(b.passage_ids) - set(a.passage_ids)) for a, b in zip(rows, new, strict=True))
    assert sum(asked) == fresh > 10
    for teacher in ("shuffled", lambda example, passages: [float(len(p.id)) for p in passages]):
        again = refresh_rows(system, data, rows, config, teacher)
        assert [row.passage_ids for row in again] == [row.passage_ids for row in new]
        if teacher == "shuffled":
            assert again != new
            for left, right in zip(again, new, strict=True):
                assert sorted(left.lm_scores) == pytest.approx(sorted(right.lm_scores), abs=1e-5)
        else:
            assert again[0].lm_scores == tuple(float(len(p)) for p in again[0].passage_ids)


def test_a_question_that_finds_too_little_keeps_its_row(tmp_path, capsys):
    system, data = job.make_system(), load_qa(job.questions())
    config = job.settings(tmp_path)
    rows, _ = build_rows(system, data, config)
    retrieve = system.retriever.retrieve
    system.retriever.retrieve = lambda texts, k: [f[:1] if i == 2 else f for i, f in enumerate(retrieve(texts, k))]
    assert refresh_rows(system, data, rows, config, "lm") == rows
    assert f"1 questions keep theirs, too little was found (first: {rows[2].id})" in capsys.readouterr().out


# ---- resume ----


@pytest.mark.parametrize("stop", [4, 6, 7])
def test_stopped_and_resumed_equals_unbroken(part, unbroken, tmp_path, stop):
    config = job.settings(tmp_path, "broken", train_part=part)
    first = job.make_trainer(config)
    score, calls = first.system.retriever.score, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == stop:
            first.run.request_stop()
        return score(*args, **kwargs)

    first.system.retriever.score = stopping
    assert first.train().steps == stop
    again = job.make_trainer(config)
    again.train(resume=True)
    assert_as(again, unbroken)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("case", ["mid-run", "saving", "scoring"])
def test_killed_and_resumed_equals_unbroken(part, unbroken, tmp_path, kill_when, hold, case):
    if part == "both":
        pytest.skip("what is kept does not depend on the part, and stopping tests both")
    config = job.settings(tmp_path, "killed", train_part=part)
    run = Run.create(config, tmp_path, name="killed")
    folder = run.dir / "refreshed"
    if case == "mid-run":
        hold.at(5)
        kill_when([JOB, run.dir, part], hold.arrived, hold.environment)
        assert (folder / "step-3").is_dir() and run.last_checkpoint().name == "checkpoint-4"
    else:
        reached = tmp_path / "reached"
        kill_when([JOB, run.dir, part], reached.exists, {"HANG_WHILE": case, "REACHED": str(reached)})
        assert not (folder / "step-6").exists() and run.last_checkpoint().name == "checkpoint-6"
        assert len(list(folder.iterdir())) == (2 if case == "saving" else 1)  # a half-written one
    trainer = job.make_trainer(config, Run.open(run.dir))
    trainer.train(resume=True)
    assert_as(trainer, unbroken)
    assert sorted(path.name for path in folder.iterdir()) == ["step-3", "step-6"]


def test_what_a_resumed_run_lacks_is_named(tmp_path):
    config = job.settings(tmp_path, train={"max_steps": 5, "save_steps": 5, "schedule": "constant"})
    job.make_trainer(config).train()
    more = config.model_copy(deep=True)
    more.train.max_steps = 7
    shutil.rmtree(tmp_path / "run" / "refreshed")
    with pytest.raises(DataError, match="step-3: missing; the run cannot go on at step 5 .*up to step 3, or start"):
        job.make_trainer(more).train(resume=True)


def test_a_run_extended_at_a_refresh_makes_it_then(tmp_path):
    config = job.settings(tmp_path, train={"max_steps": 6, "schedule": "constant"})
    trainer = job.make_trainer(config)
    trainer.train()
    assert not (trainer.run.dir / "refreshed" / "step-6").exists()  # nothing was trained on after it
    config.train.max_steps = STEPS = 9
    again = job.make_trainer(config)
    assert again.train(resume=True).steps == STEPS
    whole = job.make_trainer(job.settings(tmp_path, "whole", train={"schedule": "constant"}))
    whole.train()
    assert kept(again.run, 6) == kept(whole.run, 6)
    assert [event["loss"] for event in again.run.events()] == [event["loss"] for event in whole.run.events()]


def test_another_interval_is_another_run(tmp_path):
    config = job.settings(tmp_path, train={"max_steps": 4})
    job.make_trainer(config).train()
    other = config.model_copy(update={"refresh_steps": 2})
    with (
        pytest.warns(OtherSettingsWarning, match="other settings and goes on with these: refresh_steps: 3, now 2$"),
        pytest.raises(DataError, match="started with other settings"),
    ):
        job.make_trainer(other).train(resume=True)


def test_a_run_that_goes_on_with_other_settings_says_so(tmp_path):
    config = job.settings(tmp_path, train={"max_steps": 4})
    job.make_trainer(config).train()
    other = config.model_copy(deep=True, update={"gamma": 0.7, "output_dir": str(tmp_path / "elsewhere")})
    other.train.max_steps, other.train.logging_steps = 6, 2
    run = Run.open(tmp_path / "run")
    words = "started with other settings and goes on with these: train.max_steps: 4, now 6; gamma: 0.1, now 0.7$"
    with pytest.warns(OtherSettingsWarning, match=words):
        assert job.make_trainer(other, run=run).train(resume=True).steps == 6
    with pytest.raises(RunError, match="cannot be gone on with as a run of RALTConfig"):
        open_run(RALTConfig(), run, resume=True, again=False)


def test_given_rows_must_be_of_the_questions(tmp_path):
    system, data = job.make_system(), load_qa(job.questions())
    config = job.settings(tmp_path)
    rows, _ = build_rows(system, data, config)
    with pytest.raises(DataError, match="'Peru-capital' is not in train_data"):
        job.LSRTrainer(system, job.questions()[3:], config, rows=rows)
    with pytest.raises(DataError, match="not of the same questions: 1 differ, as 'Peru-capital'"):
        Candidates(rows).replace(rows[1:])
    with pytest.raises(DataError, match="'Peru-capital' occurs twice"):
        Candidates([rows[0], *rows])


# ---- the index of the dense retriever ----


def test_an_index_is_swapped_whole_or_not_at_all(system, monkeypatch):
    monkeypatch.setattr(retriever_module, "PART", 7)
    retriever = system.retriever
    old, ids = retriever.store, [passage.id for passage in retriever.store.passages()]
    before, encode, calls = old.embeddings(ids), retriever.encode_passages, []

    def failing(texts):
        calls.append(len(texts))
        assert retriever.store is old and torch.equal(old.embeddings(ids), before)  # serves meanwhile
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(texts) + torch.ones(1, 384)

    retriever.mark_stale()
    monkeypatch.setattr(retriever, "encode_passages", failing)
    with pytest.raises(KeyboardInterrupt):
        retriever.refresh()
    assert retriever.store is old and retriever.stale and torch.equal(old.embeddings(ids), before)
    calls.append(0)  # never 3 again
    retriever.refresh()
    assert calls[-3:] == [7, 7, 6] and retriever.store is not old and not retriever.stale
    assert [passage.id for passage in retriever.store.passages()] == ids
    assert not torch.allclose(retriever.store.embeddings(ids), before, atol=1e-3)
