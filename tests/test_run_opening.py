"""Going on with a run: what asked it to stop before is forgotten, what asks it afterwards holds; and who may not."""

from __future__ import annotations

import warnings

import lsr_job
import pytest
from silence import no_warning

from ragkit.commands import BAD_INPUT, main
from ragkit.config import GFMFinetuneConfig, GFMPretrainConfig, LSRConfig, RALTConfig
from ragkit.resuming import begin_with
from ragkit.run_opening import OtherSettingsWarning, open_run
from ragkit.runs import Run, RunError
from ragkit.tuning.ralt import RALTTrainer

BUSY = "is being trained: another training of this process works on it"


@pytest.fixture
def run(tmp_path):
    return Run.create(LSRConfig(), tmp_path, name="one")


# ---- requests to stop ----


def test_an_old_request_is_forgotten_once(run):
    run.request_stop()
    run.begin_resume()
    assert not run.stop_requested
    run.request_stop()
    assert open_run(LSRConfig(), run, resume=True, again=False) is run and run.stop_requested
    run.end_resume()
    open_run(LSRConfig(), run, resume=True, again=False)
    assert not run.stop_requested


def test_a_command_forgets_an_old_request_but_not_one_for_its_job(run, monkeypatch):
    run.request_stop()
    monkeypatch.setenv("RAGKIT_JOB", "token")  # `Job.resume` has forgotten old ones before it started this process
    open_run(LSRConfig(), begin_with(run.dir), resume=True, again=False)
    assert run.stop_requested
    monkeypatch.delenv("RAGKIT_JOB")
    begin_with(run.dir)
    assert not run.stop_requested


def test_only_the_first_process_forgets(run, monkeypatch):
    """Another one may come so late that the request is a new one."""
    run.request_stop()
    monkeypatch.setenv("RANK", "1")
    open_run(LSRConfig(), begin_with(run.dir), resume=True, again=False)
    assert run.stop_requested


def half_an_lsr_run(folder, steps=4):
    """A run with a checkpoint at every second step, that has `steps` of its steps behind it."""
    config = lsr_job.settings(folder, refresh_steps=None, train={"max_steps": steps, "schedule": "constant"})
    lsr_job.make_trainer(config).train()
    config.train.max_steps = lsr_job.STEPS
    return config, Run.open(folder / "run")


def test_a_stop_while_lsr_prepares_its_rows_holds(tmp_path):
    config, run = half_an_lsr_run(tmp_path)
    run.request_stop()  # after the end: an old one
    trainer = lsr_job.make_trainer(config, run=run)
    assert trainer.train(resume=True).steps == lsr_job.STEPS
    config, run = half_an_lsr_run(tmp_path / "again")
    run.request_stop()
    trainer = lsr_job.make_trainer(config, run=run)
    rows_of = trainer._rows_of

    def press(*arguments):
        assert not run.stop_requested
        Run(run.dir).request_stop()
        return rows_of(*arguments)

    trainer._rows_of = press
    result = trainer.train(resume=True)
    assert result.stopped and result.steps == 5
    assert trainer.train(resume=True).stopped  # pressed again
    trainer._rows_of = rows_of
    assert trainer.train(resume=True).steps == lsr_job.STEPS


def test_a_stop_while_ralt_prepares_its_rows_holds(tmp_path):
    config = RALTConfig(output_dir=str(tmp_path), name="run", top_k=2)
    config.train.max_steps, config.train.batch_size, config.train.schedule = 2, 4, "constant"
    RALTTrainer(lsr_job.make_system(), lsr_job.questions(), config).train()
    run = Run.open(tmp_path / "run")
    config.train.max_steps = 6
    run.request_stop()
    trainer = RALTTrainer(lsr_job.make_system(), lsr_job.questions(), config, run=run)
    rows = trainer.rows

    def press():
        assert not run.stop_requested
        Run(run.dir).request_stop()
        return rows()

    trainer.rows = press
    result = trainer.train(resume=True)
    assert result.stopped and result.steps == 3


# ---- runs that are being trained ----


def test_a_second_resume_leaves_the_files_of_a_live_run_alone(tmp_path):
    config = lsr_job.settings(tmp_path, train={"max_steps": 4, "schedule": "constant"})
    lsr_job.make_trainer(config).train()
    run = Run.open(tmp_path / "run")
    (run.checkpoints_dir / "checkpoint-4").rename(run.checkpoints_dir / "hidden")  # the refresh is of step 3
    files = [path for path in sorted(run.dir.rglob("*")) if path.is_file()]
    assert run.dir / "refreshed" / "step-3" / "rows.json" in files
    with run.hold():
        run.request_stop()
        before = {path: path.read_bytes() for path in run.dir.rglob("*") if path.is_file()}
        with pytest.raises(RunError, match=BUSY):
            lsr_job.make_trainer(config, run=Run.open(run.dir)).train(resume=True)
        assert {path: path.read_bytes() for path in run.dir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("lsr", LSRConfig),
        ("ralt", RALTConfig),
        ("gfm-finetune", GFMFinetuneConfig),
        ("gfm-pretrain", GFMPretrainConfig),
    ],
)
def test_a_command_refuses_a_live_run_before_it_loads_anything(tmp_path, capsys, monkeypatch, command, kind):
    from ragkit import commands

    monkeypatch.setattr(commands, "silence_libraries", lambda: None)  # its settings would outlive the test
    run = Run.create(kind(), tmp_path, name="one")
    with run.hold():
        assert main([command, f"resume={run.dir}"]) == BAD_INPUT
    said = capsys.readouterr()
    assert BUSY in said.err and said.out == ""


# ---- another number of processes ----


def gone_on_with(run, config, monkeypatch, then, now):
    with run.hold(processes=then) as held:
        held.end("stopped")
    monkeypatch.setenv("WORLD_SIZE", str(now))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_run(config, run, resume=True, again=False)
    assert all(warning.category is OtherSettingsWarning for warning in caught)
    return [str(warning.message) for warning in caught]


def test_another_number_of_processes_is_warned_about(tmp_path, monkeypatch):
    config = LSRConfig(train={"batch_size": 8, "gradient_accumulation_steps": 2})
    run = Run.create(config, tmp_path, name="one")
    (said,) = gone_on_with(run, config, monkeypatch, 2, 1)
    assert said == (
        f"{run.dir} was trained in 2 processes and goes on in 1 process: a step has 16 rows from here on, not 32, so "
        "the number of steps is another, and rows are trained on twice or left out. To go on as it began: torchrun "
        "--nproc_per_node=2"
    )
    (said,) = gone_on_with(run, config, monkeypatch, 1, 2)
    assert "32 rows from here on, not 16" in said and said.endswith("without torchrun")
    assert gone_on_with(run, config, monkeypatch, 2, 2) == []
    same = LSRConfig(train={"batch_size": 8, "gradient_accumulation_steps": 4})
    assert all("processes" not in said for said in gone_on_with(run, same, monkeypatch, 2, 1))


def test_a_run_that_does_not_tell_its_processes_is_not_warned_about(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with no_warning():
        open_run(LSRConfig(), run, resume=True, again=False)
