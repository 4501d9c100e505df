"""The run panel on commands in processes of their own: real trainings of a random two-layer LM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from watching import losses, until

from ragkit.config import LSRConfig, RALTConfig
from ragkit.runs import Run, RunError
from ragkit.widgets.run_panel import RunPanel

CAPITALS = {"Peru": "Lima", "Ghana": "Accra", "Norway": "Oslo", "Japan": "Tokyo", "Kenya": "Nairobi", "Fiji": "Suva"}


@pytest.fixture
def own(tmp_path, monkeypatch, tiny_lm, tokenizer):
    """A working folder with a corpus, questions and an LM; and RALT's settings for them, as a function."""
    passages = [{"id": c, "title": c, "text": f"{capital} is the capital of {c}."} for c, capital in CAPITALS.items()]
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

    def settings(steps=4000, corpus="corpus.jsonl", **changes):
        return RALTConfig(
            train={"max_steps": steps, "batch_size": 2, "num_threads": 1, "save_steps": 10},
            data={"corpus": corpus, "train": "train.jsonl", "test": "test.jsonl"},
            rag={"generator": "lm", "max_new_tokens": 2, "device": "cpu"},
            **changes,
        )

    return settings


@pytest.fixture
def panels():
    """Panels of a test, whose processes end with it."""
    made = []
    yield made
    for panel in made:
        if panel._source.work is not None and panel._source.work.alive:
            panel._source.work.kill()
        panel.wait(120)


def test_a_name_that_is_taken_and_a_folder_that_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Run.create(LSRConfig(), "runs", "a")
    panel = RunPanel(LSRConfig(name="a"))
    panel.start_button.click()
    assert panel.state == "ready" and "choose another name" in panel.message
    assert "choose another name" in panel.display.said.value
    (tmp_path / "file").write_text("")
    panel = RunPanel(LSRConfig(output_dir="file"))
    with pytest.raises(RunError, match="choose one that you may write to"):
        panel.run()


def test_a_panel_on_a_run_that_failed_says_how_to_go_on(tmp_path, monkeypatch):
    """Its Start is off: what it names is Resume, or a new run."""
    monkeypatch.chdir(tmp_path)
    run = Run.create(RALTConfig(), "runs", "a")
    folder = tmp_path / "runs" / "a.job"
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps({"kind": "ralt", "exit": 2, "pid": 1, "created": 1.0, "started": 5}))
    (folder / "log.txt").write_text("ragkit: no usable question\n")
    panel = RunPanel.attach(run.dir)
    words = "Failed before the first step: No usable question. Put this right, and "
    assert panel.state == "failed" and panel.start_button.disabled and not panel.resume_button.disabled
    assert panel.message == words + "press Resume; with other settings, start a new run."
    run.config_path.write_text("")
    run.config_path.unlink()
    run.dir.rmdir()
    panel = RunPanel.attach(run.dir)
    assert panel.resume_button.disabled and panel.message == words + "start a new run."


@pytest.mark.slow
def test_start_watch_stop_resume_and_the_table(own, panels, held, tmp_path):
    panel = RunPanel(own(steps=24))
    panels.append(panel)
    held.at(3)
    panel.start_button.click()
    assert panel.state == "starting" and panel.stop_button.disabled is False
    panel.start_button.click()
    assert "goes on already" in panel.message
    held.wait()
    until(lambda: panel.state == "running" and panel._status.step == 3)
    other = RunPanel.latest("runs", "ralt")  # the notebook was closed and opened again
    assert other.state == "running" and other.run_dir == panel.run_dir
    other.stop_button.click()
    held.let_go()
    assert other.wait(300) == "stopped" and panel.wait(300) == "stopped"
    assert f"checkpoint-4 is in {panel.run_dir.relative_to(tmp_path)}/checkpoints" in panel.message
    assert f"python -m ragkit ralt resume={panel.run_dir.relative_to(tmp_path)}" in panel.display.where.value
    panel.resume_button.click()
    assert panel.wait(300) == "finished", panel.message
    assert "CPU, 1 thread" in panel.display.machine.value and "use it: python -m ragkit" in panel.display.where.value
    assert "Before and after the training" in panel.display.tables.value and panel.table.labels == ["before", "after"]
    assert "<svg" in panel.display.picture.value and panel.plot().alt.startswith("Loss from")
    whole = RunPanel(own(steps=24))
    panels.append(whole)
    assert whole.run()["steps"] == 24
    assert losses(panel) == losses(whole) and len(losses(whole)) == 24


@pytest.mark.slow
def test_a_kernel_restarted_while_the_job_runs(own, panels, held, tmp_path):
    held.at("create")
    (tmp_path / "one.yaml").write_text(own(name="one").to_yaml())
    code = (
        "from ragkit.config import RALTConfig, load_config; from ragkit.widgets import RunPanel;"
        "panel = RunPanel(load_config(RALTConfig, 'one.yaml')); panel.start(); print(panel.state)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "starting", done.stderr
    panel = RunPanel.attach("runs/one")
    panels.append(panel)
    assert panel.state == "starting"
    held.wait()
    held.at(11)  # the checkpoint of step 10 is there
    held.wait()
    until(lambda: panel.state == "running")
    os.kill(panel._source.work.record()["child"], signal.SIGKILL)
    assert panel.wait(300) == "interrupted"
    assert "SIGKILL" in panel.message and "Press Resume to go on." in panel.message
    with pytest.raises(RunError, match="SIGKILL"):
        panel.run()
    held.at(12)
    panel.resume_button.click()
    held.wait()
    until(lambda: panel.state == "running")
    panel.stop()
    held.let_go()
    assert panel.wait(300) == "stopped"


@pytest.mark.slow
def test_stop_before_the_first_step(own, panels, held):
    panel = RunPanel(own())
    panels.append(panel)
    held.at("create")
    panel.start()
    held.wait()
    panel.stop_button.click()
    assert panel.state == "stopping" and "no step was made yet" in panel.message
    assert panel.wait(300) == "stopped"
    assert panel.message.startswith("Stopped before the first step; nothing was trained.")
    assert panel.resume_button.disabled and not panel.start_button.disabled
    assert panel.run() is None


@pytest.mark.slow
def test_a_command_that_fails_at_once(own, panels):
    panel = RunPanel(own(corpus="nowhere.jsonl"))
    panels.append(panel)
    with pytest.raises(RunError, match=r"Failed before the first step: .*nowhere\.jsonl.* and start a new run\."):
        panel.run()
    assert panel.state == "failed" and "nowhere.jsonl" in panel.display.log.value
    assert panel.display.where.value.count("log.txt") == 1


@pytest.mark.slow
def test_an_estimate_of_settings_leaves_the_kernel_free(own, panels, tmp_path):
    panel = RunPanel(own(steps=50))
    panels.append(panel)
    panel.estimate_button.click()
    assert "Estimating" in panel.display.estimate.value and panel.estimate_button.disabled
    assert panel.state == "ready" and not panel.start_button.disabled
    panel._estimating.wait()
    until(lambda: not panel.estimate_button.disabled)
    assert "steps" in panel.display.estimate.value and "memory" in panel.display.estimate.value
    assert not (tmp_path / "runs").exists()
    bad = RunPanel(own(corpus="nowhere.jsonl"))
    bad.estimate()
    bad._estimating.wait()
    assert "there is no estimate: " in bad.display.estimate.value and "nowhere.jsonl" in bad.display.estimate.value
    again = RunPanel(own(steps=50))
    panels.append(again)
    again.estimate()
    again.start()  # the estimate is given up for it
    assert not again._estimating.busy and again.display.estimate.value == ""


@pytest.mark.slow
def test_two_processes(own, panels, held):
    panel = RunPanel(own(), processes=2)
    panels.append(panel)
    held.at(3)
    panel.start()
    held.wait()
    until(lambda: "2 processes" in panel.display.machine.value and "memory" in panel.display.machine.value)
    panel.stop()
    held.let_go()
    assert panel.wait(300) == "stopped", panel.message
    assert not panel.resume_button.disabled
