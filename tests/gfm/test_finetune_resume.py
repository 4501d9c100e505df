"""A fine-tuning that was stopped, killed, or ran out of disk goes on as if nothing had happened."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import finetune_job as job
import pytest
import torch

from ragkit.engine import NonFiniteLossError
from ragkit.gfm import load_gfm
from ragkit.gfm.training import best_of
from ragkit.runs import Run, RunError

JOB = Path(job.__file__)

STEPS = 24  # 18 + 10 questions in batches of 4, each of one data set: 8 batches an epoch, 3 epochs


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """The engine collects garbage at each start: half a second over all that was imported, which is set aside here."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return job.write_two(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(root):
    """The unbroken run, and its result."""
    return unbroken_run(root, root)


@pytest.fixture
def settings(root, tmp_path):
    """settings(...): the same settings for a run in a folder of its own."""
    return lambda **changes: often_saved(root, tmp_path, **{"name": "broken", **changes})


def curve(run):
    """The events without the clock."""
    return [{k: v for k, v in event.items() if k not in ("elapsed", "remaining")} for event in run.events()]


def assert_equal_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_as_unbroken(trainer, result, unbroken, expected):
    """Events, last weights in the checkpoint, best weights in model/ and in memory, and what was best."""
    run, whole = trainer.run, unbroken.run
    assert curve(run) == curve(whole)
    assert best_of(run) == best_of(whole)
    assert (result.loss, result.steps, result.stopped) == (expected.loss, STEPS, False)
    assert_equal_weights(trainer.model.state_dict(), unbroken.model.state_dict())
    assert_equal_weights(load_gfm(run.dir / "model").state_dict(), unbroken.model.state_dict())
    assert run.last_checkpoint().name == f"checkpoint-{STEPS}"
    last = [Path(r.last_checkpoint(), "model.safetensors").read_bytes() for r in (run, whole)]
    assert last[0] == last[1]


def often_saved(root, folder, **changes):
    changes["train"] = {"save_steps": 3, **changes.get("train", {})}
    return job.config(root, output_dir=str(folder), **changes)


def unbroken_run(root, folder, **changes):
    trainer = job.make(often_saved(root, folder, name="whole", **changes))
    return trainer, trainer.train()


def at_batch(trainer, number, act):
    """Does something just before the batch `number` (from 1) that this trainer takes."""
    make_batch, count = trainer.make_batch, itertools.count(1)

    def watched(key):
        if next(count) == number:
            act()
        return make_batch(key)

    trainer.make_batch = watched
    return trainer


def stop_at(trainer, number):
    """Somebody presses stop while this batch is worked on."""
    return at_batch(trainer, number, lambda: trainer.run.request_stop())


# ---- stopped ----


# In the middle of an epoch, at a checkpoint in the middle of one, at an epoch's end, and after the best evaluation.
@pytest.mark.parametrize("stop", [5, 6, 8, 20])
def test_stopped_and_resumed_equals_unbroken(whole, settings, stop):
    unbroken, expected = whole
    assert expected.steps == STEPS and len({key[0].dataset for key in unbroken._order()}) == 2
    trainer = job.make(settings())
    first = stop_at(trainer, stop).train()
    assert first.stopped and first.steps == stop
    assert trainer.run.last_checkpoint().name == f"checkpoint-{stop}"

    again = job.make(settings())
    result = again.train(resume=True)
    assert_as_unbroken(again, result, unbroken, expected)

    done = job.make(settings())  # nothing is left to do, but the best weights are there
    assert done.train(resume=True).loss == expected.loss
    assert_equal_weights(done.model.state_dict(), unbroken.model.state_dict())


def test_stopped_and_resumed_with_accumulation_and_a_capped_epoch(root, settings, tmp_path):
    train = {"gradient_accumulation_steps": 2, "batch_per_epoch": 3, "batch_size": 2, "num_epoch": 8, "save_steps": 5}
    unbroken, expected = unbroken_run(root, tmp_path, train=train)
    assert expected.steps == STEPS  # 6 batches an epoch
    trainer = job.make(settings(train=train))
    stop_at(trainer, 19).train()  # in the tenth step
    assert trainer.run.last_checkpoint().name == "checkpoint-10"
    again = job.make(settings(train=train))
    result = again.train(resume=True)
    assert_as_unbroken(again, result, unbroken, expected)


def test_stopped_twice(whole, settings):
    unbroken, expected = whole
    for batch, step in ((3, 3), (8, 11)):  # a resumed run skips what it has done
        trainer = job.make(settings())
        assert stop_at(trainer, batch).train(resume=step != 3).steps == step
    again = job.make(settings())
    result = again.train(resume=True)
    assert_as_unbroken(again, result, unbroken, expected)


def test_a_run_is_resumed_by_name_or_as_it_is_given(settings):
    with pytest.raises(RunError, match="there is no run folder .*missing"):
        job.make(settings(name="missing")).train(resume=True)
    with pytest.raises(RunError, match="which run is to be resumed"):
        job.make(settings(name=None)).train(resume=True)
    trainer = job.make(settings(name="run"))
    stop_at(trainer, 4).train()
    with pytest.raises(RunError, match='there is a run ".*run" already'):
        job.make(settings(name="run")).train()
    opened = job.make(settings(name=None), Run.open(trainer.run.dir))
    assert opened.train(resume=True).steps == STEPS


# ---- killed ----


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_before_a_checkpoint_and_resumed_equals_unbroken(whole, settings, kill_when, hold):
    unbroken, expected = whole
    run = Run.create(settings(), settings().output_dir, "broken")
    hold.at(18)  # its event is written, its checkpoint is not
    kill_when([JOB, run.dir], hold.arrived, hold.environment)
    assert run.events()[-1]["step"] == 18 and run.last_checkpoint().name == "checkpoint-15"

    trainer = job.make(settings())
    result = trainer.train(resume=True)
    assert_as_unbroken(trainer, result, unbroken, expected)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_between_an_evaluation_and_its_checkpoint(whole, settings, kill_when):
    """The best model is ahead of the checkpoint; the resumed run comes to the same evaluation again."""
    unbroken, expected = whole
    run = Run.create(settings(), settings().output_dir, "broken")
    kill_when([JOB, run.dir], (run.dir / "evaluated").exists, {"WAIT_AFTER_EVALUATION": "2"})
    assert run.last_checkpoint().name == "checkpoint-15"
    assert run.events()[-1]["step"] == 16 and "eval_ent_mrr" in run.events()[-1]
    best = best_of(run)
    assert best is not None and best["step"] in (8, 16)

    trainer = job.make(settings())
    result = trainer.train(resume=True)
    assert_as_unbroken(trainer, result, unbroken, expected)


# ---- damaged ----


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "trainer_state.json", "rng_state.pth"])
def test_a_truncated_checkpoint_is_passed_over(whole, settings, name):
    unbroken, expected = whole
    trainer = job.make(settings())
    stop_at(trainer, 11).train()
    assert [path.name for path in trainer.run.checkpoints()] == ["checkpoint-9", "checkpoint-11"]
    damaged = trainer.run.last_checkpoint() / name
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert trainer.run.last_checkpoint().name == "checkpoint-9"
    again = job.make(settings())
    result = again.train(resume=True)
    assert_as_unbroken(again, result, unbroken, expected)


def test_no_whole_checkpoint_means_from_the_beginning(whole, settings):
    unbroken, expected = whole
    trainer = job.make(settings())
    stop_at(trainer, 2).train()
    (trainer.run.last_checkpoint() / "trainer_state.json").unlink()
    again = job.make(settings())
    result = again.train(resume=True)
    assert_as_unbroken(again, result, unbroken, expected)


# ---- no room on the disk ----


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE on this system")
def test_a_full_disk_leaves_the_last_checkpoint_and_the_best_model_whole(whole, settings):
    """In a process that may write only small files: first an optimizer's state is too large, then, after there was
    room again, the model of the second evaluation."""
    unbroken, expected = whole
    assert best_of(unbroken.run)["step"] == 16
    size = Path(unbroken.run.dir, "model", "model.safetensors").stat().st_size
    assert size + 2000 < Path(unbroken.run.last_checkpoint(), "optimizer.pt").stat().st_size
    run = Run.create(settings(), settings().output_dir, "broken")
    done = subprocess.run(
        [sys.executable, str(JOB), str(run.dir)],
        env={**os.environ, "NO_ROOM": json.dumps([[10, size + 1000], [7, size - 1]])},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert first["kind"] == "RunError" and "checkpoint-12 cannot be written" in first["message"]
    assert "MiB are free" in first["message"]
    assert "checkpoint-9 is whole: make room, and resume the run" in first["message"]
    assert (first["last"], first["best"]["step"]) == ("checkpoint-9", 8)
    assert second["kind"] == "CheckpointError" and f"{run.dir / 'model'}: cannot be written" in second["message"]
    assert "File too large" in second["message"] and "what was there before is whole" in second["message"]
    assert (second["last"], second["best"]["step"]) == ("checkpoint-15", 8)
    assert_equal_weights(
        load_gfm(run.dir / "model").state_dict(), {name: torch.tensor(rows) for name, rows in first["model"].items()}
    )
    assert not [path for path in run.dir.iterdir() if path.name.startswith(".")]  # no half of a folder stays

    trainer = job.make(settings())
    result = trainer.train(resume=True)
    assert_as_unbroken(trainer, result, unbroken, expected)


# ---- numbers that are not finite ----


def test_a_loss_that_is_not_finite_names_the_questions_and_the_run_can_go_on(whole, settings):
    unbroken, expected = whole
    trainer = job.make(settings())
    weight = trainer.model.question_mlp.weight
    with pytest.raises(
        NonFiniteLossError, match="the loss is nan at step 14 in the batch of the questions q"
    ) as caught:
        at_batch(trainer, 14, lambda: weight.data[0].fill_(float("nan"))).train()
    order = unbroken._order()
    order.set_epoch(1)
    (key,) = list(order)[13 - 8]
    assert list(caught.value.ids) == unbroken.make_batch(key)["ids"] and caught.value.step == 14
    assert trainer.run.last_checkpoint().name == "checkpoint-12"
    assert trainer.run.events()[-1]["error"] == str(caught.value)
    assert all(torch.isfinite(tensor).all() for tensor in load_gfm(trainer.run.dir / "model").state_dict().values())

    again = job.make(settings())
    result = again.train(resume=True)
    assert_as_unbroken(again, result, unbroken, expected)


def test_a_poisoned_embedding_is_refused_before_the_forward_pass(settings):
    trainer = job.make(settings())
    trainer.data.train["left"].questions.embeddings[3, 1] = float("nan")
    with pytest.raises(ValueError, match="question_embeddings: row . holds NaN or infinity"):
        trainer.train()


def test_settings_and_best_are_plain_files(whole):
    trainer, _ = whole
    assert json.loads((trainer.run.dir / "best.json").read_text()) == best_of(trainer.run)
    assert type(trainer.config)(**trainer.run.config()) == trainer.config
