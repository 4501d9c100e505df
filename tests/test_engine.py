from __future__ import annotations

import signal
import warnings
from pathlib import Path

import engine_job as job
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from ragkit.config import TrainConfig
from ragkit.engine import (
    NonFiniteLossError,
    TrainedPart,
    ZeroGradientWarning,
    freeze,
    run_training,
    trainable_parameters,
    training_arguments,
)
from ragkit.runs import CHECKPOINT_MARKER, Run, RunError

JOB = Path(job.__file__)

STEPS = 15  # 22 rows in batches of 4, 2.5 epochs


def settings(**values) -> TrainConfig:
    return TrainConfig(**{**job.SETTINGS.explicit(), **values})


def make(tmp_path, name="run", config=job.SETTINGS, kind="plain", **options):
    run = Run.create(config, tmp_path, name=name)
    return run, job.KINDS[kind](run, config, **options)


def curve(run):
    """The events without the clock."""
    return [{k: v for k, v in event.items() if k not in ("elapsed", "remaining")} for event in run.events()]


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_equal_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class StopAt(TrainerCallback):
    """Somebody presses stop while step `step` is being computed."""

    def __init__(self, run, step):
        self.run, self.step = run, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.run.request_stop()


# ---- a whole run ----


def test_a_run_leaves_events_checkpoints_and_metrics(tmp_path):
    run, trainer = make(tmp_path, evaluate_fn=lambda: {"recall": 0.5}, config=settings(eval_steps=5))
    result = run_training(trainer)
    losses = [event["loss"] for event in result.history if "loss" in event]
    assert [event["step"] for event in run.events() if "loss" in event] == list(range(1, STEPS + 1))
    for event in run.events():
        assert event["total"] == STEPS and event["elapsed"] >= 0 and event["remaining"] >= 0
        assert {"loss", "learning_rate", "grad_norm"} <= event.keys() or event["eval_recall"] == 0.5
    assert [event["step"] for event in run.events() if "eval_recall" in event] == [5, 10, 15]
    assert result.loss == pytest.approx(sum(losses) / STEPS) and losses[-1] < losses[0]
    assert (result.steps, result.stopped, result.run_dir) == (STEPS, False, run.dir)
    assert run.metrics()["loss"] == result.loss and run.metrics()["eval_recall"] == 0.5
    assert [path.name for path in run.checkpoints()] == ["checkpoint-12", "checkpoint-15"]  # save_total_limit=2
    assert all((path / CHECKPOINT_MARKER).is_file() for path in run.checkpoints())
    assert "mean loss" in repr(result) and str(run.dir) in repr(result) and "<table>" in result._repr_html_()


def test_one_process_uses_one_gpu_of_several(tmp_path, monkeypatch, caplog):
    """Else the Trainer would cut batches apart that are not made of tensors alone."""

    class Refused(nn.DataParallel):
        def __init__(self, *args, **options):
            raise AssertionError("the model was wrapped")

    monkeypatch.setattr(nn, "DataParallel", Refused)  # here there may be no GPU at all

    def two(*args, **options):
        made = training_arguments(*args, **options)
        made._n_gpu = 2
        return made

    monkeypatch.setattr(job, "training_arguments", two)
    _, trainer = make(tmp_path)
    run_training(trainer)
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == trainer.args.per_device_train_batch_size
    assert "one of 2 GPUs is used; torchrun --nproc_per_node=2" in caplog.text


def test_only_the_trained_part_moves_and_only_it_is_saved(tmp_path):
    from safetensors.torch import load_file

    run, trainer = make(tmp_path)
    net = trainer.model.module
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    run_training(trainer)
    moved = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"left.weight", "right.weight", "left.bias", "out.weight", "norm.running_mean"} <= moved
    assert not any(name.startswith("frozen") for name in moved)
    saved = load_file(run.last_checkpoint() / "model.safetensors")
    assert "left.weight" in saved and "right.weight" not in saved  # shared memory is written once
    assert not any(name.startswith("frozen") for name in saved)
    assert torch.equal(saved["left.weight"], net.left.weight)


def test_without_save_steps_there_is_a_checkpoint_at_the_end_only(tmp_path):
    run, trainer = make(tmp_path, config=settings(save_steps=None, max_steps=5))
    run_training(trainer)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-5"]


def test_evaluation_loss_of_a_loss_function_is_the_mean_over_the_rows(tmp_path):
    rows = [(f"q{i}", torch.randn(4), torch.randn(())) for i in range(8)]
    run, trainer = make(tmp_path, config=settings(eval_steps=2), eval_dataset=rows)
    found = trainer.evaluate()["eval_loss"]
    trainer.model.eval()
    with torch.no_grad():
        expected = job.squared_error(trainer.model, job.collate_points(rows))
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_accumulated_batches_give_the_step_of_one_large_batch(tmp_path):
    results = {}
    for name, batch, accumulate in (("large", 8, 1), ("small", 2, 4)):
        config = settings(batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=2, warmup_steps=0)
        run, trainer = make(tmp_path, name, config)
        trainer.model.module.norm, trainer.model.module.drop = nn.Identity(), nn.Identity()  # rows must not mix
        trainer.train_dataset = trainer.train_dataset[:16]
        run_training(trainer)
        results[name] = curve(run)
    for large, small in zip(results["large"], results["small"], strict=True):
        assert large["loss"] == pytest.approx(small["loss"], rel=1e-5)
        assert large["grad_norm"] == pytest.approx(small["grad_norm"], rel=1e-5)


def test_the_same_seed_gives_the_same_run_whatever_came_before(tmp_path):
    first, trainer = make(tmp_path, "first")
    run_training(trainer)
    second, trainer = make(tmp_path, "second")
    torch.randn(100)  # something else draws random numbers between making the trainer and training
    run_training(trainer)
    third, trainer = make(tmp_path, "third", settings(seed=6))
    run_training(trainer)
    assert curve(first) == curve(second) != curve(third)


# ---- stop and resume ----


# In the middle of an epoch, and at its end.
@pytest.mark.parametrize(("kind", "stop"), [("plain", 4), ("plain", 6), ("llama", 4), ("adapters", 4)])
def test_stopped_and_resumed_equals_unbroken(tmp_path, kind, stop):
    whole, unbroken = make(tmp_path, "whole", kind=kind)
    expected = run_training(unbroken)
    run, trainer = make(tmp_path, "broken", kind=kind)
    trainer.add_callback(StopAt(run, stop))
    first = run_training(trainer)
    assert first.stopped and first.steps == stop and run.metrics()["stopped"]
    assert run.last_checkpoint().name == f"checkpoint-{stop}" and not run.stop_requested
    elapsed = run.events()[-1]["elapsed"]

    run = Run.open(run.dir)
    trainer = job.KINDS[kind](run, job.SETTINGS)
    result = run_training(trainer, resume=True)
    assert curve(run) == curve(whole)
    assert_equal_weights(weights(trainer), weights(unbroken))
    assert (result.loss, result.steps, result.stopped) == (expected.loss, STEPS, False)
    times = [event["elapsed"] for event in run.events()]
    assert times == sorted(times) and times[stop] > elapsed  # the clock goes on

    again = job.KINDS[kind](run, job.SETTINGS)  # nothing is left to do, but the weights are there
    assert run_training(again, resume=True).loss == expected.loss and curve(run) == curve(whole)
    assert_equal_weights(weights(again), weights(unbroken))


def test_resume_with_accumulation_and_events_every_second_step(tmp_path):
    config = settings(gradient_accumulation_steps=2, logging_steps=2, save_steps=3, num_epochs=4)
    whole, unbroken = make(tmp_path, "whole", config)
    expected = run_training(unbroken)
    run, trainer = make(tmp_path, "broken", config)
    trainer.add_callback(StopAt(run, 6))
    run_training(trainer)
    trainer = job.plain(run, config)
    assert run_training(trainer, resume=True).loss == expected.loss
    assert curve(run) == curve(whole)
    assert_equal_weights(weights(trainer), weights(unbroken))


def test_a_stop_asked_for_before_the_start_is_obeyed_and_a_stale_one_is_not(tmp_path):
    run, trainer = make(tmp_path)
    run.request_stop()
    assert run_training(trainer).steps == 1
    run.request_stop()  # pressed again after the end
    assert run_training(job.plain(run, job.SETTINGS), resume=True).steps == STEPS


def test_a_used_run_is_not_trained_again_by_mistake(tmp_path):
    run, trainer = make(tmp_path, config=settings(max_steps=2))
    run_training(trainer)
    with pytest.raises(RunError, match="events up to step 2 already.*resume=True"):
        run_training(job.plain(run, settings(max_steps=2)))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run, trainer = make(tmp_path, config=settings(max_steps=3))
    run_training(trainer)
    other = job.plain(run, settings(max_steps=5))
    other.model.module.out = nn.Linear(8, 2)
    with pytest.raises(RunError, match="does not fit the model: 2 tensors.*other settings"):
        run_training(other, resume=True)


# ---- kill -9 ----


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize(
    ("kind", "case"), [("plain", "mid-run"), ("plain", "while saving"), ("plain", "early"), ("adapters", "mid-run")]
)
def test_killed_and_resumed_equals_unbroken(tmp_path, kill_when, hold, kind, case):
    whole, unbroken = make(tmp_path, "whole", kind=kind)
    expected = run_training(unbroken)
    run = Run.create(job.SETTINGS, tmp_path, name="killed")

    command = [JOB, kind, run.dir]
    if case == "while saving":
        half = run.checkpoints_dir / "checkpoint-6" / "half-written"
        kill_when(command, half.exists, {"HANG_IN": "checkpoint-6/optimizer.pt"})
        assert half.with_name("optimizer.pt").is_file() and run.last_checkpoint().name == "checkpoint-3"
    else:
        step = 1 if case == "early" else 8
        hold.at(step)
        kill_when(command, hold.arrived, hold.environment)
        assert run.events()[-1]["step"] == step
        assert run.last_checkpoint() == (None if case == "early" else run.checkpoints_dir / "checkpoint-6")

    trainer = job.KINDS[kind](run, job.SETTINGS)
    result = run_training(trainer, resume=True)
    assert curve(run) == curve(whole)  # exactly: loss, learning rate, gradient norm of every step
    assert_equal_weights(weights(trainer), weights(unbroken))
    assert result.loss == expected.loss
    assert not list(run.checkpoints_dir.rglob("half-written"))


# ---- losses and gradients that are wrong ----


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(tmp_path, bad):
    def loss(model, batch):
        value = job.squared_error(model, batch)
        return value * bad if "q3" in batch["ids"] else value

    run, trainer = make(tmp_path, loss_fn=loss, config=settings(save_steps=1, save_total_limit=99))
    with pytest.raises(NonFiniteLossError) as caught:
        run_training(trainer)
    error = caught.value
    assert f"the loss is {bad} at step {error.step} " in str(error) and "q3" in str(error) and "q3" in error.ids
    assert len(error.ids) == 4 or len(error.ids) == 2
    assert all(
        torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values() if tensor.is_floating_point()
    )
    assert run.events()[-1]["error"] == str(error) and run.events()[-1]["step"] == error.step
    assert len(run.checkpoints()) == error.step - 1


def test_a_batch_without_ids_is_described_by_its_shapes(tmp_path):
    def collate(rows):
        return {"x": torch.stack([row[1] for row in rows])}

    run, trainer = make(
        tmp_path, loss_fn=lambda model, batch: model(batch["x"]).sum() * torch.nan, data_collator=collate
    )
    with pytest.raises(NonFiniteLossError, match=r"step 1 in the batch of x \[4, 4\]"):
        run_training(trainer)


def test_a_gradient_of_zero_is_warned_about_once(tmp_path):
    run, trainer = make(tmp_path, loss_fn=lambda model, batch: job.squared_error(model, batch) * 0.0)
    with pytest.warns(ZeroGradientWarning, match="exactly 0 at the last 3 logged steps") as caught:
        run_training(trainer)
    assert len([w for w in caught if w.category is ZeroGradientWarning]) == 1
    assert [event["step"] for event in run.events() if "warning" in event] == [3]


def test_a_gradient_that_is_zero_now_and_then_is_not(tmp_path):
    calls = []

    def loss(model, batch):
        calls.append(1)
        return job.squared_error(model, batch) * (0.0 if len(calls) % 3 else 1.0)

    run, trainer = make(tmp_path, loss_fn=loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ZeroGradientWarning)
        run_training(trainer)


def test_evaluation_without_data_is_said_before_the_start(tmp_path):
    with pytest.raises(ValueError, match="train.eval_steps: found 5, but there is no evaluation data"):
        make(tmp_path, config=settings(eval_steps=5))


def test_nothing_to_train_is_said_before_the_start(tmp_path):
    run = Run.create(job.SETTINGS, tmp_path, name="run")
    with pytest.raises(ValueError, match="every parameter of the model has requires_grad=False"):
        job.RunTrainer(freeze(job.Net()), training_arguments(job.SETTINGS, run, device="cpu"), run)


# ---- parts ----


def test_freeze_is_real():
    net = job.Net()
    assert set(trainable_parameters(net)) == {
        *("left.weight", "left.bias", "right.bias", "out.weight", "out.bias", "norm.weight", "norm.bias"),
    }
    assert freeze(net) is net and trainable_parameters(net) == {} and not net.training


def test_trained_part_reaches_through_and_checks_what_it_loads():
    part = TrainedPart(job.Net())
    assert part.out is part.module.out and part(torch.zeros(2, 4)).shape == (2,)
    with pytest.raises(AttributeError):
        _ = part.nonsense
    state = {name: tensor + 1 for name, tensor in part.state_dict().items()}
    part.load_state_dict(state)
    assert torch.equal(part.module.right.weight, state["left.weight"])
    with pytest.raises(RunError, match="1 tensors are missing"):
        part.load_state_dict({name: tensor for name, tensor in state.items() if name != "out.bias"})


def test_arguments_follow_the_settings(tmp_path):
    run = Run.create(job.SETTINGS, tmp_path, name="run")
    args = training_arguments(settings(schedule="constant", precision="bf16", max_steps=7), run, device="cpu")
    assert (args.lr_scheduler_type, args.bf16, args.max_steps) == ("constant_with_warmup", True, 7)
    assert args.use_cpu and args.report_to == [] and not args.logging_nan_inf_filter and not args.remove_unused_columns
    assert training_arguments(settings(schedule="constant", warmup_steps=0), run, device="cpu").lr_scheduler_type == (
        "constant"
    )
    assert training_arguments(settings(), run, device="cpu", logging_steps=9).logging_steps == 9
    with pytest.raises(ValueError, match='train.precision: found "fp16", which needs a GPU'):
        training_arguments(settings(precision="fp16"), run, device="cpu")


def test_warmup_as_a_share_of_all_steps(tmp_path):
    run, trainer = make(tmp_path, config=settings(warmup_steps=0.5, schedule="linear"))
    run_training(trainer)
    rates = [event["learning_rate"] for event in run.events()]
    assert max(rates) == rates[8] == 0.01 and rates[0] == 0
