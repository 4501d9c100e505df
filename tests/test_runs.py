from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from ragkit.config import LSRConfig, load_config
from ragkit.run_state import EventReader, read_record
from ragkit.runs import CHECKPOINT_MARKER, Run, RunError, check_name, checkpoint_is_complete, mark_complete


@pytest.fixture
def run(tmp_path):
    return Run.create(LSRConfig(), tmp_path, name="one")


def checkpoint(run, step, marked=True):
    """A folder as transformers leaves it: weights first, trainer_state.json last."""
    path = run.checkpoints_dir / f"checkpoint-{step}"
    path.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    (path / "optimizer.pt").write_bytes(b"optimizer")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if marked:
        mark_complete(path)
    return path


# ---- folder ----


def test_create_writes_the_settings_and_open_reads_them(tmp_path):
    config = LSRConfig(gamma=0.2)
    run = Run.create(config, tmp_path / "runs", name="a.b-1")
    assert run.dir == tmp_path / "runs" / "a.b-1"
    assert load_config(LSRConfig, Run.open(run.dir).config_path) == config
    assert Run.open(run.dir).config()["gamma"] == 0.2
    with pytest.raises(RunError, match="already"):
        Run.create(config, tmp_path / "runs", name="a.b-1")


def test_runs_without_a_name_never_share_a_folder(tmp_path):
    runs = [Run.create(LSRConfig(), tmp_path) for _ in range(4)]
    assert len({run.dir for run in runs}) == 4
    assert all(run.name.startswith("lsr-") for run in runs)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "-x", "x" * 101, "a\n", "C:\\x", "é"])
def test_names_that_cannot_be_a_folder(name, tmp_path):
    with pytest.raises(RunError, match="cannot be the name of a run"):
        Run.create(LSRConfig(), tmp_path, name=name)
    assert list(tmp_path.iterdir()) == []


def test_usable_names():
    assert check_name("lsr-2_a.b") == "lsr-2_a.b"


def test_open_says_what_is_wrong(run, tmp_path):
    with pytest.raises(RunError, match=r'no run folder ".*two"; in .* there are: one'):
        Run.open(tmp_path / "two")
    (tmp_path / "half").mkdir()
    with pytest.raises(RunError, match="no config.yaml"):
        Run.open(tmp_path / "half")
    run.config_path.write_text("[1, 2]")
    with pytest.raises(RunError, match="config.yaml: expected a mapping, found a list"):
        Run.open(run.dir)
    run.config_path.write_text("a: [")
    with pytest.raises(RunError, match="config.yaml: cannot be read"):
        Run.open(run.dir)


# ---- events ----


def test_events_come_back_in_order_with_plain_numbers(run):
    assert run.events() == []
    run.log({"step": 1, "loss": np.float32(0.5), "where": run.dir, "list": (1, np.int64(2))})
    run.log({"step": 2, "loss": float("nan"), "grad": float("inf"), "text": "é\nb"})
    assert run.events() == [
        {"step": 1, "loss": 0.5, "where": str(run.dir), "list": [1, 2]},
        {"step": 2, "loss": None, "grad": None, "text": "é\nb"},
    ]
    assert run.events_path.read_text(encoding="utf-8").count("\n") == 2
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        run.log({"step": 3, "object": object()})
    assert len(run.events()) == 2


@pytest.mark.parametrize("half", ['{"step": 3, "lo', '{"step": 3}', "é"[:1]])
def test_a_half_written_last_line_is_left_out_and_written_over(run, half):
    run.log({"step": 1})
    run.log({"step": 2})
    with run.events_path.open("a", encoding="utf-8") as file:
        file.write(half)  # killed before the line break
    assert [event["step"] for event in run.events()] == [1, 2]
    assert [event["step"] for event in Run.open(run.dir).events()] == [1, 2]
    run.log({"step": 3, "again": True})
    assert run.events() == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_the_very_first_line_half_written(run):
    run.events_path.write_text('{"st')
    assert run.events() == []
    run.log({"step": 1})
    assert run.events() == [{"step": 1}]


def test_a_corrupt_line_in_the_middle_is_named(run):
    run.events_path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"events.jsonl, line 2: not an event"):
        run.events()
    run.events_path.write_text("[1]\n")
    with pytest.raises(RunError, match="expected an object, found list"):
        Run.open(run.dir)


def test_truncate_drops_later_steps(run):
    for step in (1, 2, 3, 4):
        run.log({"step": step})
    run.log({"note": "without a step"})
    assert run.truncate_events(2) == 2
    assert run.events() == [{"step": 1}, {"step": 2}, {"note": "without a step"}]
    assert run.truncate_events(9) == 0


def _write_many(path, writer):
    run = Run(path)
    for i in range(200):  # lines of several pages: a write grows the file page by page
        run.log({"writer": writer, "i": i, "text": "x" * 20_000})


def test_two_processes_never_mix_their_lines(run):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_many, args=(run.dir, w)) for w in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    events = run.events()
    for writer in range(2):
        assert [event["i"] for event in events if event["writer"] == writer] == list(range(200))


# ---- metrics and stop ----


def test_metrics_are_merged_and_checked(run):
    assert run.metrics() == {}
    run.write_metrics({"loss": 1.5, "steps": 3})
    run.write_metrics({"loss": np.float64(0.5), "bad": float("nan")})
    assert run.metrics() == {"loss": 0.5, "steps": 3, "bad": None}
    run.metrics_path.write_text('{"loss"')
    with pytest.raises(RunError, match="metrics.json: not valid JSON"):
        Run.open(run.dir)
    run.metrics_path.write_text("[]")
    with pytest.raises(RunError, match="expected an object"):
        run.metrics()


def test_another_process_can_stop_the_run(run):
    assert not run.stop_requested
    code = f"from ragkit.runs import Run; Run.open({str(run.dir)!r}).request_stop()"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert run.stop_requested
    run.clear_stop()
    run.clear_stop()
    assert not run.stop_requested


# ---- checkpoints ----


def test_checkpoints_by_step_not_by_name(run):
    assert run.checkpoints() == [] and run.last_checkpoint() is None
    for step in (100, 20, 3):
        checkpoint(run, step)
    (run.checkpoints_dir / "checkpoint-x").mkdir()
    (run.checkpoints_dir / "other").mkdir()
    assert [path.name for path in run.checkpoints()] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert run.last_checkpoint() == run.checkpoints_dir / "checkpoint-100"


def test_a_process_killed_between_the_state_and_our_marker_loses_nothing(run):
    path = checkpoint(run, 5, marked=False)
    assert checkpoint_is_complete(path) and run.last_checkpoint() == path


def test_half_written_checkpoints_are_passed_over(run):
    good = checkpoint(run, 1)
    broken = {step: checkpoint(run, step) for step in range(2, 8)}
    (broken[2] / "trainer_state.json").unlink()  # killed before the state
    (broken[3] / "trainer_state.json").write_text('{"global_st')  # killed while writing it
    weights = broken[4] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (broken[4] / CHECKPOINT_MARKER).unlink()  # the size in the header is enough
    (broken[5] / "optimizer.pt").write_bytes(b"opt")  # the marker knows its size
    (broken[6] / "optimizer.pt").unlink()  # killed while deleting
    (broken[7] / "trainer_state.json").write_text('{"global_step": 8}')
    assert run.checkpoints() == [good]
    (good / CHECKPOINT_MARKER).write_text("{")
    assert run.last_checkpoint() is None


def test_old_and_later_checkpoints_are_dropped(run):
    for step in (1, 2, 3, 4):
        checkpoint(run, step)
    run.drop_old_checkpoints(None)
    assert len(run.checkpoints()) == 4
    run.drop_old_checkpoints(3)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    (run.checkpoints_dir / "checkpoint-9").mkdir()
    run.drop_checkpoints_after(2)
    assert [path.name for path in run.checkpoints_dir.iterdir()] == ["checkpoint-2"]


# ---- who works on it, and how it stands ----


def test_how_a_run_stands(run, tmp_path):
    assert run.state().name == "new" and Run(tmp_path / "none").state().name == "missing"
    with run.hold(device="cpu") as held:
        run.log({"step": 3, "total": 10, "loss": 1.0})
        state = run.state()
        assert (state.name, state.step, state.total, state.facts["device"]) == ("running", 3, 10, "cpu")
        assert state.facts["pid"] == os.getpid() and state.facts["program"] == "python"
        assert str(state) == "running at step 3 of 10"
        held.end("stopped")
    assert run.state().name == "stopped"
    with pytest.raises(ValueError, match="broken"), run.hold():
        raise ValueError("broken\n  here")
    assert run.state().name == "failed" and run.state().error == "broken here"
    with pytest.raises(KeyboardInterrupt), run.hold():
        raise KeyboardInterrupt
    assert run.state().name == "interrupted" and run.state().error is None


def test_only_one_works_on_a_run(run):
    with run.hold():
        with pytest.raises(RunError, match="another training of this process works on it. Watch it with"), run.hold():
            pytest.fail("held twice")
        code = f"from ragkit.runs import Run\nwith Run({str(run.dir)!r}).hold(): pass"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert f"the process {os.getpid()} on" in done.stderr
        assert run.state().name == "running"  # the refused ones changed nothing
    with run.hold() as held:
        held.end("finished")
    assert run.state().name == "finished"


def test_a_killed_process_lets_go_of_its_run(run):
    code = f"""
import time
from ragkit.runs import Run
with Run({str(run.dir)!r}).hold():
    print("held", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    assert run.state().name == "running" and run.state().facts["pid"] == process.pid
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert run.state().name == "interrupted"


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_where_the_file_system_has_no_locks_the_process_is_looked_for(run, monkeypatch, host):
    from ragkit import run_state

    monkeypatch.setattr(run_state, "try_lock", lambda handle: None)
    monkeypatch.setattr(run_state, "is_locked", lambda path: None)
    with run.hold():
        assert run.state().name == "running"
        with pytest.raises(RunError, match="works on it"), run.hold():
            pass
    record = read_record(run.dir)
    assert record["locked"] is False
    record |= {"pid": 2**22 + 1, "state": "running"}  # no such process
    if host == "elsewhere":
        record["host"] = "another machine"  # whose processes cannot be seen
    (run.dir / "state.json").write_text(json.dumps(record))
    assert run.state().name == ("interrupted" if host == "here" else "running")
    if host == "here":
        record |= {"pid": os.getpid(), "created": record["created"] - 60}  # its number is another program's now
        (run.dir / "state.json").write_text(json.dumps(record))
        assert run.state().name == "interrupted"


def test_how_an_old_run_without_a_state_file_stands(run):
    run.log({"step": 3, "total": 10, "loss": 1.0})
    assert run.state().name == "interrupted"
    run.write_metrics({"stopped": True})
    assert run.state().name == "stopped"
    run.write_metrics({"stopped": False})
    assert run.state().name == "finished"
    (run.dir / "state.json").write_text('{"state": "fin')  # half of one
    assert run.state().name == "finished"
    run.metrics_path.write_text("{")
    run.log({"step": 4, "total": 10, "error": "nan"})
    assert run.state().name == "failed" and run.state().error == "nan" and run.state().step == 3


def test_events_are_read_bit_by_bit(run):
    reader = EventReader(run.events_path)
    assert not reader.read() and reader.step == 0 and reader.total is None and reader.last("loss") is None
    for step in (1, 2):
        run.log({"step": step, "total": 9, "loss": float(step)})
    assert reader.read() and reader.step == 2 and reader.total == 9 and reader.last("loss") == 2.0
    assert not reader.read()
    with run.events_path.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    assert not reader.read() and reader.step == 2
    with run.events_path.open("ab") as file:
        file.write(b'ss": 3.0}\nnonsense\n[1]\n')
    assert reader.read() and reader.step == 3 and reader.bad == 2 and len(reader.events) == 3
    run.events_path.write_text('{"step": 1, "total": 9, "loss": 1.0}\n')
    assert reader.read() and len(reader.events) == 1 and reader.bad == 0
    run.truncate_events(0)  # a new file, as large as before it was written
    run.log({"step": 1, "total": 9, "loss": 5.0})
    assert reader.read() and reader.last("loss") == 5.0
    assert reader.events == run.events()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_where_the_file_system_has_no_locks_events_are_written_without(run, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with run.hold() as held:
        run.log({"step": 1, "total": 2, "loss": 1.0})
        held.end("stopped")
    assert len(run.events()) == 1 and run.state().name == "stopped"
