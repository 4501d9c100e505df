"""Jobs: real commands in processes of their own, on a corpus of twelve passages and a random two-layer LM."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from watching import losses, until

from ragkit import job_process
from ragkit.config import EvaluateConfig, LSRConfig, RALTConfig
from ragkit.job_commands import command_of_run
from ragkit.job_search import latest
from ragkit.jobs import Job
from ragkit.run_state import is_process
from ragkit.runs import Run, RunError
from ragkit.widgets.run_words import where_words

CAPITALS = {"Peru": "Lima", "Ghana": "Accra", "Norway": "Oslo", "Japan": "Tokyo", "Kenya": "Nairobi", "Fiji": "Suva"}


@pytest.fixture
def own(tmp_path, monkeypatch, tiny_lm, tokenizer):
    """A working folder with a corpus, questions and an LM; and RALT's settings for them, as a function."""
    passages = [{"id": c, "title": c, "text": f"{capital} is the capital of {c}."} for c, capital in CAPITALS.items()]
    passages += [{"id": f"{c} food", "text": f"The markets of {c} sell fish, rice and fruit."} for c in CAPITALS]
    rows = [
        {"id": c, "question": f"What is the capital of {c}?", "answer": capital, "supporting_facts": [c]}
        for c, capital in CAPITALS.items()
    ]
    for name, content in (("corpus", passages), ("train", rows), ("test", rows[:3])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    tiny_lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def settings(steps=400, **changes):
        train = {"max_steps": steps, "batch_size": 2, "num_threads": 1, "save_steps": 10, **changes.pop("train", {})}
        data = {"corpus": "corpus.jsonl", "train": "train.jsonl", "test": "test.jsonl"}
        rag = {"generator": "lm", "max_new_tokens": 2, "device": "cpu"}
        return RALTConfig(train=train, data={**data, **changes.pop("data", {})}, rag=rag, **changes)

    return settings


@pytest.fixture
def jobs():
    """Jobs of a test, none of which outlives it."""
    made = []
    yield made
    for job in made:
        if job.alive:
            job.kill()
            job.wait(120)


# ---- without a training ----


def test_settings_that_are_no_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="found EvaluateConfig, expected the settings of a training"):
        Job.start(EvaluateConfig())
    with pytest.raises(RunError, match="processes: found 0"):
        Job.start(LSRConfig(), processes=0)
    with pytest.raises(RunError, match="cannot be the name of a run"):
        Job.start(LSRConfig(name="a/b"))
    Run.create(LSRConfig(), "runs", "a")
    with pytest.raises(RunError, match="there is a run .* already; choose another name"):
        Job.start(LSRConfig(name="a"))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a"]


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="choose one that you may write to"):
        Job.start(LSRConfig(output_dir="file/runs"))


def test_a_run_that_no_job_made(tmp_path):
    with pytest.raises(RunError, match="there is no run folder"):
        Job.attach(tmp_path / "none")
    run = Run.create(LSRConfig(), tmp_path, "a")
    job = Job.attach(run.dir)
    assert not job.alive and job.status().name == "new" and job.log() == [] and job.pids() == []
    assert command_of_run(run) == "lsr" and command_of_run(Run.create(RALTConfig(), tmp_path, "b")) == "ralt"
    with pytest.raises(RunError, match="trained by Python code, not by a command"):
        job.resume()
    Run.create(EvaluateConfig(), tmp_path, "c")
    assert command_of_run(Run(tmp_path / "c")) is None
    (tmp_path / "c" / "config.yaml").write_text("")  # one broken run does not hide the others
    assert command_of_run(Run(tmp_path / "c")) is None and latest(tmp_path, "ralt").name == "b"


def test_a_number_that_is_another_process_now(tmp_path):
    run = Run.create(LSRConfig(), tmp_path, "a")
    (tmp_path / "a.job").mkdir()
    record = {"kind": "lsr", "pid": os.getpid(), "created": 1.0, "exit": None, "started": time.time()}
    (tmp_path / "a.job" / "job.json").write_text(json.dumps(record))
    job = Job.attach(run.dir)
    assert not job.alive and job.pids() == [] and job.status().name == "interrupted"
    job.kill()  # nobody


def test_the_line_that_says_what_went_wrong(tmp_path):
    job = Job(tmp_path / "a")
    job.folder.mkdir()
    (job.folder / "log.txt").write_text("x\nragkit: no such corpus\nE1126 the launcher's own lines\n\n")
    (job.folder / "job.json").write_text(json.dumps({"kind": "lsr", "exit": 2, "pid": 1, "created": 1.0}))
    state = job.status()
    assert (state.name, state.error) == ("failed", "no such corpus")
    (job.folder / "log.txt").write_text("Traceback\n  here\nKeyError: 'x'\n")
    assert job.status().error == "KeyError: 'x'"
    (job.folder / "job.json").write_text(json.dumps({"kind": "lsr", "exit": -9, "pid": 1, "created": 1.0}))
    assert job.status().name == "interrupted" and "run out of memory" in job.status().error


def written(folder, name, status, log="", began=None, **record):
    """A run with a job that has ended, as it is found later; `status` None: nobody wrote down how."""
    run = Run.create(RALTConfig(), folder, name)
    job = folder / f"{name}.job"
    job.mkdir()
    gone = {"pid": 2**22 + 1, "created": 1.0, "child": 2**22 + 2, "child_created": 1.0}
    values = {"kind": "ralt", "arguments": [], "processes": 1, "cwd": str(folder), "started": time.time() - 100}
    (job / "job.json").write_text(json.dumps({**values, **gone, "token": "ours", "exit": status, **record}))
    (job / "log.txt").write_text(log)
    return run


def trained(run, state, error=None, job=None, **facts):
    """A training that has worked on the run."""
    with run.hold(program="ragkit", job=job, **facts) as held:
        run.log({"step": 4, "total": 40, "loss": 1.0})
        held.end(state, error)


@pytest.mark.parametrize("status", [2, -9, 130, None])
def test_the_end_of_a_job_is_not_that_of_a_training_in_a_shell_after_it(tmp_path, status):
    run = written(tmp_path, "a", status, "ragkit: no room\n")
    trained(run, "failed" if status == 2 else "interrupted", job="ours")
    assert Job.attach(run.dir).status().name == ("failed" if status == 2 else "interrupted")
    (tmp_path / "a.job" / "stop").touch()
    assert Job.attach(run.dir).status().name == "stopped"
    for state in ("finished", "stopped", "interrupted"):
        trained(run, state)
        assert Job.attach(run.dir).status() == run.state() and run.state().name == state
    record = json.loads((tmp_path / "a.job" / "job.json").read_text())
    token = record.pop("token")  # a job of an older ragkit
    (tmp_path / "a.job" / "job.json").write_text(json.dumps(record))
    assert Job.attach(run.dir).status() == run.state()
    (tmp_path / "a.job" / "job.json").write_text(json.dumps({**record, "token": token}))
    trained(run, "finished", job="ours")  # but it ended after its own training, while it scored
    assert Job.attach(run.dir).status().name == "stopped"


def test_a_training_says_which_start_of_a_job_it_is_of(tmp_path, monkeypatch):
    run = Run.create(LSRConfig(), tmp_path, "a")
    monkeypatch.setenv("RAGKIT_JOB", "this")
    with run.hold():
        assert run.state().facts["job"] == "this"
    monkeypatch.delenv("RAGKIT_JOB")
    with run.hold():
        assert run.state().facts["job"] is None


def test_a_run_goes_on_with_as_many_processes_as_before(tmp_path, monkeypatch):
    run = Run.create(RALTConfig(), tmp_path, "a")
    trained(run, "stopped", processes=2)  # torchrun in a shell
    job = Job.attach(run.dir)
    launched = []
    monkeypatch.setattr(Job, "_launch", lambda self, command, arguments, processes: launched.append(processes))
    job.resume()
    job.resume(3)
    assert launched == [2, 3]
    run = written(tmp_path, "b", 2, processes=4)  # it failed before it trained
    assert Job.attach(run.dir).processes() == 4
    trained(run, "stopped", processes=2)
    assert Job.attach(run.dir).processes() == 2
    assert Job.attach(written(tmp_path, "c", 2).dir).processes() == 1
    words = where_words(job, "stopped")
    assert "in a shell: torchrun --nproc_per_node 2 -m ragkit ralt resume=" in words
    assert "in a shell: python -m ragkit ralt resume=" in where_words(Job(tmp_path / "c"), "failed")


def test_the_error_is_that_of_the_last_start(tmp_path):
    old = "ragkit: the loss is nan\n"
    run = written(tmp_path, "a", 2, old + "Killed in the middle\n", log_start=len(old))
    trained(run, "failed", "the loss is nan", job="before")
    record = json.loads((tmp_path / "a.job" / "job.json").read_text())
    (tmp_path / "a.job" / "job.json").write_text(json.dumps({**record, "started": time.time() + 1}))
    assert Job.attach(run.dir).status().error == "Killed in the middle"
    (tmp_path / "a.job" / "log.txt").write_text(old)
    assert Job.attach(run.dir).status().error == "the command ended with status 2"
    run = written(tmp_path, "b", 2, "ragkit: this\n")
    trained(run, "failed", "this, in full", job="ours")
    assert Job.attach(run.dir).status().error == "this, in full"


def test_a_full_disk_hides_no_error(tmp_path, monkeypatch):
    run = written(tmp_path, "a", None)  # the process over the command could not write either
    trained(run, "failed", "checkpoint-5 cannot be written: make room", job="ours")
    state = Job.attach(run.dir).status()
    assert (state.name, state.error) == ("failed", "checkpoint-5 cannot be written: make room")

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(job_process, "atomic_write_json", full)
    monkeypatch.setattr(job_process.signal, "signal", lambda number, handler: None)
    path = tmp_path / "a.job" / "job.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "arguments": [sys.executable, "-c", "raise SystemExit(3)"]}, indent=8))
    assert job_process.main(path) == 0
    record = json.loads(path.read_text())
    assert record["exit"] == 3 and record["pid"] == os.getpid() and record["token"] == "ours"


SUMMARY = """Traceback (most recent call last):
  File "torch/distributed/run.py", line 1032, in <module>
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
ragkit.__main__ FAILED
------------------------------------------------------------
Failures:
[1]:
  traceback : Signal 15 (SIGTERM) received by PID 30587
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  exitcode  : 2 (pid: 30588)
  error_file: <N/A>
  traceback : {cause}
============================================================
"""
SENDING = (
    "W1126 09:56:17.633000 30583 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 1 SIGTERM\n"
)


@pytest.mark.parametrize(
    "said, cause, expected",
    [
        ("[rank1]: RuntimeError: CUDA out of memory\n[rank1]: note\n", "none", "RuntimeError: CUDA out of memory"),
        ("ValueError: a\ntorch.OutOfMemoryError: b\n", "none", "torch.OutOfMemoryError: b"),
        ("ragkit: no corpus\nOSError: later\n", "none", "no corpus"),
        ("loading\n----\n", "none", "loading"),
        ("", "none", "the command ended with status 1"),
        ("ragkit: closed by peer\n", "Signal 9 (SIGKILL) received by PID 3", "one of its processes was ended from "
         "outside (SIGKILL): the machine may have run out of memory"),
    ],
)  # fmt: skip
def test_what_went_wrong_stands_before_the_summary_of_torchrun(tmp_path, said, cause, expected):
    run = written(tmp_path, "a", 1, said + SENDING + SUMMARY.format(cause=cause), processes=2)
    state = Job.attach(run.dir).status()
    assert (state.name, state.error) == ("failed", expected)


def test_a_run_folder_that_was_deleted_while_nobody_looked(tmp_path):
    run = written(tmp_path, "a", 0, "use it:     python -m ragkit query\n")
    shutil.rmtree(run.dir)
    state = Job.attach(run.dir).status()
    assert state.name == "missing" and state.error is None


def test_a_project_that_was_renamed_and_a_process_that_cannot_be_started(tmp_path, monkeypatch):
    run = written(tmp_path, "a", -9, cwd=str(tmp_path / "old"))
    monkeypatch.chdir(tmp_path)
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: started.append(options))
    job = Job.attach(run.dir)
    job._launch("ralt", ["resume=a"], 1)
    assert started[0]["cwd"] == str(tmp_path) and job.record()["cwd"] == str(tmp_path)
    assert started[0]["env"]["RAGKIT_JOB"] == job.record()["token"] != "ours"
    run = written(tmp_path, "b", -9)
    (tmp_path / "b.job" / "stop").touch()
    before = Job.attach(run.dir).record()
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    job = Job.attach(run.dir)
    with pytest.raises(RunError, match=r"b\" cannot be started: .*no python.*\. Its folder .* must be there"):
        job.resume()
    assert job.record() == before and not job.alive and job.status().name == "stopped"
    with pytest.raises(RunError, match="cannot be started"):
        Job.start(RALTConfig(output_dir="runs", name="c"))
    assert not Job(tmp_path / "runs" / "c").alive


# ---- with one ----


@pytest.mark.slow
def test_a_command_that_fails_at_once(own, jobs):
    job = Job.start(own(data={"corpus": "nowhere.jsonl"}))
    jobs.append(job)
    assert job.wait(300)
    state = job.status()
    assert state.name == "failed" and "nowhere.jsonl" in state.error and "Traceback" not in state.error
    assert not job.run.dir.exists() and job.resumable()[0] is None
    assert Job.attach(job.run.dir).status() == state


@pytest.mark.slow
def test_a_job_outlives_its_notebook_stops_and_goes_on_as_unbroken(own, jobs, held, tmp_path):
    """One Python process starts it and is gone; another watches, stops and resumes it."""
    held.at("create")
    config = own(steps=40, name="one")
    (tmp_path / "one.yaml").write_text(config.to_yaml())
    code = (
        "from ragkit.config import RALTConfig, load_config; from ragkit.jobs import Job;"
        "print(Job.start(load_config(RALTConfig, 'one.yaml')).run.dir)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    folder = done.stdout.strip()
    job = Job.attach(folder)
    jobs.append(job)
    assert job.alive and job.status().name == "starting" and latest("runs").name == "one"
    held.wait()
    held.at(3)
    held.wait()
    assert job.status().name == "running" and job.status().step == 3
    assert len(job.pids()) >= 2 and job.status().facts["program"] == "ragkit"
    with pytest.raises(RunError, match="is still running"):
        job.resume()
    job.stop()
    held.let_go()
    assert job.wait(300)
    state = job.status()
    assert state.name == "stopped" and state.step == 4
    assert job.run.last_checkpoint().name == f"checkpoint-{state.step}"
    assert any(line.startswith("stopped at step") for line in job.log())
    os.chdir("/")  # the settings' paths are relative to where it was started
    held.at(6)
    job.resume()
    job.stop()
    until(lambda: job.stop() or held.arrived() or not job.alive)
    job.stop()
    held.let_go()
    until(lambda: job.stop() or job.status().name == "stopped" and not job.alive)
    job.resume()
    assert job.wait(300) and job.status().name == "finished", job.log()
    os.chdir(tmp_path)
    whole = Job.start(own(steps=40, name="whole"))
    jobs.append(whole)
    assert whole.wait(300)
    assert losses(job.run) == losses(whole.run) and len(losses(job.run)) == 40
    assert (job.run.dir / "evaluation.json").exists()
    assert latest("runs").name == "whole" and latest("runs", "lsr") is None


@pytest.mark.slow
def test_stop_before_there_is_a_run_folder(own, jobs, held):
    held.at("create")
    job = Job.start(own())
    jobs.append(job)
    held.wait()
    job.stop()
    assert job.wait(300)
    assert job.status().name == "stopped" and not job.run.dir.exists()


def test_killed_before_it_says_its_number(own, jobs):
    job = Job.start(own())
    jobs.append(job)
    job.kill()
    assert not job.alive and job.status().name == "interrupted" and not job.run.dir.exists()


@pytest.mark.slow
def test_kill_9_of_the_job(own, jobs):
    job = Job.start(own(steps=4000))
    jobs.append(job)
    until(lambda: job.run.last_checkpoint() is not None)
    os.kill(job.record()["child"], signal.SIGKILL)
    assert job.wait(300)
    state = job.status()
    assert state.name == "interrupted" and "SIGKILL" in state.error and job.resumable() == ("ralt", "")
    job.resume()
    until(lambda: job.status().name == "running" and job.status().step > state.step)
    pids = job.pids()
    job.kill()
    assert job.wait(300)
    until(lambda: not any(is_process(pid, None) for pid in pids))
    assert job.status().name == "interrupted" and Job.attach(job.run.dir).status().name == "interrupted"


@pytest.mark.slow
def test_the_process_over_the_command_is_killed_and_the_training_goes_on(own, jobs):
    job = Job.start(own(steps=4000))
    jobs.append(job)
    until(lambda: job.status().step > 2)
    guardian = job.record()["pid"]
    os.kill(guardian, signal.SIGKILL)
    until(lambda: not is_process(guardian, None))
    assert job.alive and Job.attach(job.run.dir).status().name == "running"
    job.stop()
    assert job.wait(300) and job.status().name in ("stopped", "interrupted") and job.run.last_checkpoint() is not None


@pytest.mark.slow
def test_the_run_folder_is_deleted_while_it_trains(own, jobs):
    job = Job.start(own(steps=4000))
    jobs.append(job)
    until(lambda: job.status().step > 2)
    shutil.rmtree(job.run.dir, ignore_errors=True)
    until(lambda: job.status().name == "missing")
    until(lambda: job.stop() or not job.alive)
    assert job.status().name == "missing" and job.resumable()[0] is None


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(own, jobs):
    job = Job.start(own(steps=4000), processes=2)
    jobs.append(job)
    until(lambda: job.status().step > 2)
    assert job.status().facts["processes"] == 2 and len(job.pids()) >= 4
    pids = job.pids()
    job.stop()
    assert job.wait(300), job.log()
    stopped = job.status()
    assert stopped.name == "stopped" and job.record()["exit"] == 0, job.log()
    until(lambda: not any(is_process(pid, None) for pid in pids))
    job.resume()
    until(lambda: job.status().name == "running" and job.status().step > stopped.step)
    assert job.status().facts["processes"] == 2
    pids = job.pids()
    job.kill()
    assert job.wait(300)
    until(lambda: not any(is_process(pid, None) for pid in pids))


@pytest.mark.slow
def test_two_processes_stop_before_they_train(own, jobs):
    job = Job.start(own(), processes=2)
    jobs.append(job)
    until(lambda: len(job.pids()) >= 4)
    pids = job.pids()
    until(lambda: job.stop() or not job.alive)
    assert job.status().name == "stopped"
    until(lambda: not any(is_process(pid, None) for pid in pids))
