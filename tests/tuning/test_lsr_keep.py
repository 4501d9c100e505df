"""LSR ends with the weights that did best on held-out questions, the initial ones among them, however it was run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lsr_job as job
import pytest
import torch
from launching import TORCHRUN
from safetensors.torch import load_file

from ragkit.best import best_of, keep_if_better
from ragkit.config import LSRConfig, QuickstartConfig
from ragkit.holding_out import connected, hold_out
from ragkit.runs import Run, RunError
from ragkit.tuning.lsr import LSRTrainer
from ragkit.tuning.qa_data import QAExample
from ragkit.tuning.selection import Selection, hold_out_examples

QUICK = {"eval_steps": 2, "learning_rate": 0.01}  # the best of the right teacher's steps is in the middle
HELPERS = {"PYTHONPATH": os.pathsep.join([str(Path(job.__file__).parent), os.environ.get("PYTHONPATH", "")])}
pytestmark = [
    pytest.mark.filterwarnings("ignore::ragkit.tuning.lsr_table.TeacherWarning"),
    pytest.mark.usefixtures("quick_collections"),
]


@pytest.fixture(scope="module")
def quick_collections():
    import gc

    gc.freeze()
    yield
    gc.unfreeze()


def rows(supporting=True):
    """The job's questions; each is supported by the passage with its place and word."""
    return [{**row, **({"supporting_facts": [row["id"]]} if supporting else {})} for row in job.questions()]


def right(example, passages):
    """A teacher for whom the supporting passage helps."""
    return [0.0 if passage.id == example.id else -4.0 for passage in passages]


def wrong(example, passages):
    """A teacher for whom it is the one passage that does not help."""
    return [-4.0 if passage.id == example.id else 0.0 for passage in passages]


def settings(folder, name="run", **changes):
    return job.settings(folder, name, **{"valid_share": 0.3, "refresh_steps": None, **changes})


def trainer_of(config, teacher=right, supporting=True, **options):
    return LSRTrainer(job.make_system(), rows(supporting), config, teacher=teacher, **options)


def weights(trainer):
    retriever = trainer.system.retriever
    parts = {"question": retriever.question_encoder, "passage": retriever.encoder}
    return {f"{part}.{n}": t.detach().clone() for part, m in parts.items() for n, t in m.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def curve(run, metric="held_out/ndcg@10"):
    return {e["step"]: e[f"eval_{metric}"] for e in run.events() if f"eval_{metric}" in e}


def held_out_score(trainer):
    """nDCG@10 by hand: one supporting passage a question, so 1 / log2(1 + rank)."""
    found = trainer.system.retriever.retrieve([e.question for e in trainer.held_out], 10)
    total = 0.0
    for example, passages in zip(trainer.held_out, found, strict=True):
        names = [passage.id for passage in passages]
        if example.id in names:
            total += 1 / torch.tensor(2.0 + names.index(example.id), dtype=torch.float64).log2().item()
    return total / len(trainer.held_out)


def index_fits(trainer):
    retriever = trainer.system.retriever
    with torch.no_grad():
        fresh = retriever.encoder([passage.text for passage in retriever.passages])
    ids = [passage.id for passage in retriever.passages]
    return not retriever.stale and torch.allclose(retriever.store.embeddings(ids), fresh, atol=1e-6)


# ---- what is kept ----


@pytest.mark.parametrize("part", ["query", "both"])
def test_a_teacher_that_harms_leaves_the_retriever_as_it_was(part, tmp_path, capsys):
    trainer = trainer_of(settings(tmp_path, train_part=part), wrong)
    before, score = weights(trainer), held_out_score(trainer)
    result = trainer.train()
    assert result.steps == job.STEPS and all(e["grad_norm"] > 0 for e in result.history if "grad_norm" in e)
    values = curve(trainer.run)
    assert values[0] == pytest.approx(score, abs=1e-12) and max(list(values.values())[1:]) < values[0]
    assert_same(weights(trainer), before)
    assert index_fits(trainer) and held_out_score(trainer) == pytest.approx(score, abs=1e-12)
    assert result.kept.step == 0 and result.kept.start == result.kept.value == values[0]
    said = "kept the encoder of step 0: training did not help on the 7 held-out questions"
    assert said in capsys.readouterr().out and "training did not help" in repr(result)
    assert trainer.run.metrics()["kept_step"] == 0
    last = trainer_of(settings(tmp_path, "last", train_part=part, keep="last"), wrong)
    done = last.train()
    assert done.kept is None and best_of(last.run) is None and held_out_score_of(last, trainer.held_out) < score
    assert len(last.rows()) == 24 and len(trainer.rows()) == 17


def held_out_score_of(trainer, examples):
    other = type("Of", (), {"system": trainer.system, "held_out": examples})
    return held_out_score(other)


@pytest.mark.parametrize("part", ["query", "both"])
def test_a_teacher_that_helps_is_followed_to_the_best_step(part, tmp_path, capsys):
    config = settings(tmp_path, train_part=part, train={"max_steps": 12, "eval_steps": 3, "learning_rate": 0.02})
    trainer = trainer_of(config)
    result = trainer.train()
    values = curve(trainer.run)
    assert list(values) == [0, 3, 6, 9, 12]
    best = max(values, key=lambda step: (values[step], -step))  # the first of equal ones
    assert best > 0 and result.kept.step == best and result.kept.value == values[best] > values[0]
    assert held_out_score(trainer) == pytest.approx(values[best], abs=1e-12) and index_fits(trainer)
    assert f"kept the encoder of step {best} of 12: held_out/ndcg@10 {values[0]:.4f} -> " in capsys.readouterr().out
    # A training that ends at that step, with a constant rate, has the same weights.
    flat = {"schedule": "constant", "learning_rate": 0.02}
    whole = trainer_of(settings(tmp_path, "flat", train_part=part, train={**flat, "max_steps": 8, "eval_steps": 2}))
    step = whole.train().kept.step
    short = {**flat, "max_steps": step}
    ended = trainer_of(settings(tmp_path, "short", train_part=part, train=short))
    ended._selection = lambda *_: None  # the same rows, but the last weights
    ended.train()
    assert step and weights(ended).keys() == weights(whole).keys()
    assert_same(weights(whole), weights(ended))


def test_without_supporting_passages_the_loss_decides(tmp_path):
    config = settings(tmp_path, train={"learning_rate": 1.0, "max_steps": 4, "eval_steps": 1})  # much too fast
    trainer = trainer_of(config, supporting=False)
    result = trainer.train()
    values = curve(trainer.run, "held_out/loss")
    assert len(values) == 5 and result.kept.metric == "held_out/loss"
    best = min(values, key=lambda step: (values[step], step))
    assert result.kept.step == best and result.kept.value == values[best]
    # By hand, of the weights that were kept and of the rows that were kept.
    saved = json.loads((trainer.run.dir / "held_out" / "rows.json").read_text())["rows"]
    assert [row["id"] for row in saved] == [example.id for example in trainer.held_out]
    total = 0.0
    for row in saved:
        with torch.no_grad():
            scores = trainer.system.retriever.score([row["question"]], [row["passage_ids"]])[0].double()
        teacher = torch.tensor([0.0 if p == row["id"] else -4.0 for p in row["passage_ids"]]).double()
        p, q = (scores / config.gamma).softmax(-1), (teacher / config.beta).softmax(-1)
        total += float((p * (p / q).log()).sum())
    assert total / len(saved) == pytest.approx(values[best], abs=1e-5)


# ---- stopped, killed, resumed ----


@pytest.fixture(scope="module", params=["right", "wrong"])
def unbroken(request, tmp_path_factory):
    trainer = trainer_of(settings(tmp_path_factory.mktemp("whole"), train=QUICK), globals()[request.param])
    kept = trainer.train().kept
    assert 0 < kept.step < job.STEPS if request.param == "right" else kept.step == 0
    return trainer


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_stopped_and_resumed_keeps_the_same(unbroken, tmp_path, stop):
    config = settings(tmp_path, train=QUICK)
    first = trainer_of(config, unbroken.teacher)
    score, calls = first.system.retriever.score, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == stop:
            first.run.request_stop()
        return score(*args, **kwargs)

    first.system.retriever.score = stopping
    half = first.train()
    assert half.steps == stop and half.kept.step <= stop  # the best so far
    again = trainer_of(config, unbroken.teacher)  # new weights, as a new process has them
    result = again.train(resume=True)
    assert curve(again.run) == curve(unbroken.run) and best_of(again.run) == best_of(unbroken.run)
    assert_same(weights(again), weights(unbroken))
    assert result.kept.start == curve(unbroken.run)[0]
    once_more = trainer_of(config, unbroken.teacher)
    once_more.train(resume=True)  # nothing is left to do
    assert_same(weights(once_more), weights(unbroken))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("where", ["weights", "best.json", "step"])
def test_killed_and_resumed_keeps_the_same(unbroken, tmp_path, kill_when, where):
    """Killed while the weights of an evaluation are half-written, between them and best.json, and in a later step."""
    if unbroken.teacher is wrong:
        pytest.skip("what is kept does not depend on the teacher, and stopping tests both")
    config = settings(tmp_path, "killed", train=QUICK)
    run = Run.create(config, tmp_path, name="killed")
    name, reached = unbroken.teacher.__name__, tmp_path / "reached"
    kill_when([__file__, run.dir, name, where], reached.exists, {"REACHED": str(reached), **HELPERS})
    trainer = trainer_of(config, unbroken.teacher, run=Run.open(run.dir))
    trainer.train(resume=True)
    assert curve(run) == curve(unbroken.run) and best_of(run) == best_of(unbroken.run)
    assert_same(weights(trainer), weights(unbroken))


def test_kept_weights_that_cannot_be_read_are_named(tmp_path):
    config = settings(tmp_path)
    trainer = trainer_of(config)
    trainer.train()
    path = trainer.run.dir / "best.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RunError, match=r"best.safetensors: the kept weights cannot be read"):
        trainer_of(config).train(resume=True)
    (trainer.run.dir / "best.json").write_text('{"metric"')
    with pytest.raises(RunError, match=r"best.json: cannot be read"):
        trainer_of(config).train(resume=True)


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights(tmp_path):
    """Each of the two has half of a batch, and the first one's choice and weights are those of both."""
    config = settings(tmp_path, "both", train=QUICK)
    run = Run.create(config, tmp_path, name="both")
    command = [*TORCHRUN, __file__, str(run.dir), "right", "torchrun"]
    environment = {**os.environ, **HELPERS}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("kept the encoder of step") == 1
    first, second = (load_file(run.dir / f"rank{rank}.safetensors") for rank in (0, 1))
    assert_same(first, second)
    kept = load_file(run.dir / "best.safetensors")
    for name, tensor in kept.items():
        assert torch.equal(first[name.rpartition("trained.")[2]], tensor), name
    values = curve(run)
    assert best_of(run)["value"] == max(values.values()) and best_of(run)["step"] > 0


# ---- what is held out ----


def test_no_passage_and_no_text_stands_on_both_sides():
    examples = [
        QAExample(str(i), f"question {i % 90}", ("a",), tuple(f"p{(i * 7 + j) % 80}" for j in range(i % 3)))
        for i in range(120)
    ]
    for seed in range(5):
        config = LSRConfig(valid_share=0.2, train={"seed": seed})
        kept, held = hold_out_examples(examples, config)
        assert sorted([*kept, *held], key=lambda e: int(e.id)) == examples and held
        for key in (lambda e: set(e.supporting), lambda e: {e.question}):
            assert not set().union(*map(key, kept)) & set().union(*map(key, held))
        assert hold_out_examples(examples, config) == (kept, held)


def test_how_many_are_held_out():
    examples = [QAExample(str(i), f"q{i}", ("a",)) for i in range(300)]
    assert len(hold_out_examples(examples, LSRConfig())[1]) == 30
    assert len(hold_out_examples(examples[:200], LSRConfig())[1]) == 20
    assert hold_out_examples(examples[:194], LSRConfig())[1] == []  # a tenth is too few
    assert len(hold_out_examples(examples[:40], LSRConfig(valid_share=0.1))[1]) == 4  # as asked for
    assert hold_out_examples(examples, LSRConfig(valid_share=0.0)) == (examples, [])
    assert hold_out_examples(examples, LSRConfig(keep="last", valid_share=0.5)) == (examples, [])
    shared = [QAExample(str(i), f"q{i}", ("a",), ("p",)) for i in range(300)]
    assert hold_out_examples(shared, LSRConfig()) == (shared, [])  # all on one passage
    assert QuickstartConfig().lsr.keep == "last"  # its control shows what training does


def test_groups_by_hand():
    assert connected([["a"], ["b", "c"], ["d"], ["c", "a"], ["e"]]) == [[0, 1, 3], [2], [4]]
    kept, held = hold_out([["a"], ["b", "c"], ["d"], ["c", "a"], ["e"]], 0.2, 0, [True, True, False, True, True])
    assert (kept, held) == ([0, 1, 2, 3], [4])  # the one small group that may be scored


def test_few_questions_are_all_trained_on_and_it_is_said(tmp_path, capsys):
    trainer = trainer_of(settings(tmp_path, valid_share=None))
    assert trainer.train().kept is None and len(trainer.rows()) == 24
    assert "24 questions: too few to hold some out, the last step's weights are kept" in capsys.readouterr().out


def test_given_rows_are_parted_too(tmp_path):
    everything = trainer_of(settings(tmp_path, keep="last")).rows()
    trainer = trainer_of(settings(tmp_path), rows=everything)
    held = {example.id for example in trainer.held_out}
    assert [row for row in everything if row.id not in held] == trainer.rows() and len(held) == 7
    assert trainer.for_data(rows()[:12]).held_out != trainer.held_out
    whole = trainer.for_rounds()
    assert whole.held_out == [] and sorted(row.id for row in whole.rows()) == sorted(row.id for row in everything)
    built = trainer_of(settings(tmp_path))
    built.rows()
    assert len(built.for_rounds().rows()) == 24 and len(built.rows()) == 17


def test_another_share_is_another_run(tmp_path):
    trainer_of(settings(tmp_path, train={"max_steps": 2})).train()
    other = settings(tmp_path, valid_share=0.5)
    with pytest.raises(ValueError, match="this run was started with other questions"):
        trainer_of(other).train(resume=True)


def test_a_federated_round_keeps_what_it_trained(tmp_path):
    pytest.importorskip("flwr")
    from ragkit.federated.config import FederatedConfig
    from ragkit.federated.task import FederatedTask

    trainer = trainer_of(settings(tmp_path), wrong)
    before = weights(trainer)
    task = FederatedTask(trainer, FederatedConfig(rounds=1, local_steps=2))
    result = task.simulate(num_clients=1)
    assert task.trainer.held_out == [] and result.steps() == {0: 0, 1: 2}
    moved = weights(trainer)
    assert any(not torch.equal(moved[name], tensor) for name, tensor in before.items())


def test_evaluations_while_training_need_no_other_data_and_score_both(tmp_path):
    config = settings(tmp_path, train={"eval_steps": 4})
    assert trainer_of(config).train().kept is not None
    with pytest.raises(ValueError, match="train.eval_steps is set, but there is no eval_data"):
        trainer_of(settings(tmp_path, "none", keep="last", train={"eval_steps": 4}))
    both = trainer_of(settings(tmp_path, "two", train={"eval_steps": 4}), eval_data=rows()[:5])
    both.train()
    assert curve(both.run, "recall@1").keys() == {4, 8, 9} and curve(both.run).keys() == {0, 4, 8, 9}


def test_the_steps_between_evaluations(tmp_path):
    selection = Selection(
        job.make_system(), trainer_of(settings(tmp_path)).held_out, settings(tmp_path), Run(tmp_path)
    )
    train = settings(tmp_path).train
    for changes, rows_, every in (
        ({"max_steps": 80}, 17, 80 // 8),
        ({"max_steps": 3}, 17, 1),
        ({"max_steps": None, "num_epochs": 10}, 17, 5),  # 4 steps in an epoch, 40 in all
        ({"max_steps": None, "num_epochs": 10, "gradient_accumulation_steps": 2}, 17, 3),
        ({"max_steps": 80, "eval_steps": 7}, 17, 7),
    ):
        assert selection.engine_settings(train.model_copy(update=changes), rows_).eval_steps == every
    selection.config = settings(tmp_path).model_copy(update={"train_part": "both"})
    assert selection.engine_settings(train.model_copy(update={"max_steps": 80}), 17).eval_steps == 27


def test_only_what_is_better_is_kept(tmp_path):
    run, saved = Run.create(LSRConfig(), tmp_path, "r"), []
    for step, value in enumerate([0.3, 0.3, float("nan"), 0.5, 0.4]):
        keep_if_better(run, "m", value, step, lambda step=step: saved.append(step))
    assert saved == [0, 3] and best_of(run) == {"metric": "m", "value": 0.5, "step": 3}
    assert keep_if_better(run, "m", 0.4, 9, lambda: saved.append(9), lower_is_better=True) and saved[-1] == 9


if __name__ == "__main__":
    folder, teacher, where = sys.argv[1:]
    run = Run.open(folder)
    if where == "torchrun":
        from safetensors.torch import save_file

        from ragkit.processes import join, leave, rank

        join("cpu")
        config = settings(Path(folder).parent, Path(folder).name, train=QUICK)
        trainer = trainer_of(config, globals()[teacher], run=run)
        trainer.train()
        save_file(weights(trainer), Path(folder) / f"rank{rank()}.safetensors")
        leave()
        sys.exit()

    import ragkit.best as best
    from ragkit.tuning import selection

    count = []
    if where == "weights":
        write = selection.save

        def half(tensors):
            count.append(1)
            if len(count) == 2:
                Path(folder, ".best.safetensors.half.tmp").write_bytes(write(tensors)[:100])
                job.wait()
            return write(tensors)

        selection.save = half
    elif where == "best.json":
        write_json = best.atomic_write_json

        def late(*args):
            count.append(1)
            if len(count) == 2:
                job.wait()
            write_json(*args)

        best.atomic_write_json = late
    else:
        measure = selection.Selection.measure

        def third(self):
            count.append(1)
            if len(count) == 4:
                job.wait()
            return measure(self)

        selection.Selection.measure = third
    config = settings(Path(folder).parent, Path(folder).name, train=QUICK)
    trainer_of(config, globals()[teacher], run=run).train()
