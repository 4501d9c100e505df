"""The run panel on trainers of this kernel: real trainings of a word-vector retriever, in a thread."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings

import lsr_job
import pytest
from transformers import TrainerCallback
from watching import losses, until

from ragkit.config import LSRConfig, QueryConfig
from ragkit.evaluation import EvaluationResult
from ragkit.run_state import EventReader, RunState
from ragkit.run_text import as_command
from ragkit.runs import Run, RunError
from ragkit.settings import Problem
from ragkit.units import rough_duration
from ragkit.widgets import run_view, run_words
from ragkit.widgets.run_panel import RunPanel

STEPS = lsr_job.STEPS


class Gate(TrainerCallback):
    """Holds a training after each step until it is let through."""

    def __init__(self, steps=0):
        self.passes = threading.Semaphore(steps)
        self.arrived = 0

    def on_step_end(self, *args, **kwargs):
        self.arrived += 1
        assert self.passes.acquire(timeout=300)

    def let(self, steps=10_000):
        for _ in range(steps):
            self.passes.release()


@pytest.fixture
def make(tmp_path):
    """make(name, gated): a trainer whose run will be `tmp_path/name`."""

    def trainer(name="run", gate=None, run=None, **changes):
        config = lsr_job.settings(tmp_path, name=name, **{"refresh_steps": None, **changes})
        made = lsr_job.make_trainer(config, run=run)
        if gate is not None:
            made.callbacks.append(gate)
        return made

    return trainer


def is_off(button):
    return button.disabled and getattr(button, "tooltip", "").startswith("Off: ")


# ---- start, stop, resume ----


def test_buttons_train_stop_and_resume_and_the_curve_is_that_of_an_unbroken_run(make, tmp_path, capfd):
    gate = Gate()
    panel = RunPanel(make(gate=gate))
    assert panel.state == "ready" and is_off(panel.stop_button) and is_off(panel.resume_button)
    assert not panel.start_button.disabled
    capfd.readouterr()
    panel.start_button.click()
    assert panel.state == "starting"
    until(lambda: gate.arrived == 1)
    until(lambda: panel.state == "running")
    assert is_off(panel.start_button) and is_off(panel.resume_button) and not panel.stop_button.disabled
    panel.start_button.click()
    assert "goes on already" in panel.message
    gate.let(3)
    until(lambda: gate.arrived == 4)
    panel.stop_button.click()
    assert panel.state == "stopping" and "saves a checkpoint" in panel.message
    gate.let()
    assert panel.wait(300) == "stopped"
    assert panel.message == (
        f"Stopped at step 4 of {STEPS}; checkpoint-4 is in {tmp_path}/run/checkpoints. Press Resume to go on."
    )
    assert panel.result.stopped and panel.result.steps == 4
    assert is_off(panel.start_button) and not panel.resume_button.disabled
    panel.resume_button.click()
    assert panel.wait(300) == "finished" and panel.result.steps == STEPS
    assert panel.display.progress.value == panel.display.progress.max == STEPS
    assert capfd.readouterr() == ("", "")  # a thread's text would land under another cell
    whole = make("whole").train()
    assert losses(Run.open(tmp_path / "run")) == losses(Run.open(whole.run_dir))


def test_run_starts_waits_and_returns_what_the_training_gave(make, tmp_path):
    trainer = make()
    panel = RunPanel(trainer)
    result = panel.run()
    assert result is panel.result and result.run_dir == tmp_path / "run" and result.steps == STEPS
    assert panel.run() is result  # it does not begin again
    assert trainer.system.retriever.question_encoder is not trainer.system.retriever.encoder


def test_a_finished_trainer_starts_again_in_a_new_folder(make, tmp_path):
    panel = RunPanel(make(name=None))
    first = panel.run().run_dir
    panel.start()
    panel.wait()
    assert panel.state == "finished" and panel.run_dir != first and len(list(tmp_path.glob("lsr-*"))) == 2


def test_stop_before_the_first_step(make):
    began, let = threading.Event(), threading.Event()

    def score():
        began.set()
        assert let.wait(300)
        return result([0.0])

    panel = RunPanel(make(), score=score)
    panel.start()
    assert began.wait(300)
    until(lambda: "scoring before" in panel.message)
    panel.stop_button.click()
    assert panel.state == "stopping" and "no step was made" in panel.message
    let.set()
    assert panel.wait(300) == "stopped"
    assert panel.message == "Stopped before the first step; nothing was trained. Press Resume to begin."
    panel.resume_button.click()
    assert panel.wait(300) == "finished" and panel.result.steps == STEPS


def test_stop_right_after_resume_is_not_forgotten(make):
    gate = Gate(3)
    panel = RunPanel(make(gate=gate))
    panel.start()
    until(lambda: gate.arrived == 4)
    panel.stop()
    gate.let(2)
    assert panel.wait(300) == "stopped"
    panel.resume()
    panel.stop()  # the training drops the requests that were there before it
    until(lambda: gate.arrived == 6 or panel.state == "stopped")
    time.sleep(0.6)
    gate.let()
    assert panel.wait(300) == "stopped" and panel.result.steps < STEPS


def result(values):
    import numpy as np

    return EvaluationResult([f"q{i}" for i in range(len(values))], {"mrr": np.array(values)}, bootstrap=10)


def test_scores_before_and_after_stand_in_the_table_and_in_the_folder(make):
    scores = iter([result([0.0, 0.5]), result([1.0, 0.5])])
    panel = RunPanel(make(), score=lambda: next(scores))
    assert panel.table is None
    panel.run()
    assert panel.table.difference["mrr"].mean == 0.5
    assert "Before and after the training" in panel.display.tables.value and "+0.500" in panel.display.tables.value
    assert RunPanel.attach(panel.run_dir).table.difference["mrr"].mean == 0.5


def test_the_scores_before_are_those_of_the_first_start(make):
    gate, calls = Gate(2), []

    def score():
        calls.append(len(calls))
        return {"one": result([calls[-1] / 10])}

    panel = RunPanel(make(gate=gate), score=score)
    panel.start()
    until(lambda: gate.arrived == 3)
    panel.stop()
    gate.let()
    panel.wait()
    assert panel.table is None
    panel.resume()
    panel.wait()
    assert calls == [0, 1] and panel.tables["one"].difference["mrr"].mean == pytest.approx(0.1)


def test_errors_are_said_and_raised(make):
    trainer = make()

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise RunError("the disk\nis full")

    trainer.callbacks.append(Break())
    panel = RunPanel(trainer)
    with pytest.raises(RunError, match="the disk"):
        panel.run()
    assert panel.state == "failed"
    assert panel.message == (
        f"Failed after step 4 of {STEPS}: The disk is full. checkpoint-4 is whole: once the cause is put right, "
        "Resume goes on from there."
    )
    assert 'role="alert"' in panel.display.said.value
    state = Run.open(panel.run_dir).state()
    assert state.name == "failed" and state.error == "the disk is full" and state.step == 4
    trainer.callbacks.clear()
    panel.resume()
    assert panel.wait(300) == "finished" and len(losses(Run.open(panel.run_dir))) == STEPS


def test_an_error_before_training(make):
    trainer = make()
    trainer.rows = trainer._rows_of = lambda *args: 1 / 0
    panel = RunPanel(trainer)
    with pytest.raises(ZeroDivisionError):
        panel.run()
    assert panel.message.startswith("Failed before the first step: ZeroDivisionError: division by zero.")
    assert Run(panel.run_dir).state().name == "failed" and not panel.start_button.disabled


def test_warnings_and_notes_of_the_thread_stand_in_the_log(make, capfd):
    trainer = make()

    class Say(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            warnings.warn("mind <this>", UserWarning, stacklevel=1)
            logging.getLogger("ragkit").warning("and that")
            logging.getLogger("transformers.trainer").warning("chatter")

    trainer.callbacks.append(Say())
    panel = RunPanel(trainer)
    panel.run()
    assert "warning: mind &lt;this&gt;" in panel.display.log.value and "note: and that" in panel.display.log.value
    assert f"step {STEPS}/{STEPS} loss" in panel.display.log.value
    assert capfd.readouterr() == ("", "")
    with pytest.warns(UserWarning, match="of the kernel"):
        warnings.warn("of the kernel", UserWarning, stacklevel=1)
    assert not logging.getLogger("ragkit").handlers


def test_an_interrupt_of_the_waiting_cell_stops_with_a_checkpoint(make):
    gate = Gate(2)
    panel = RunPanel(make(gate=gate))
    panel.start()
    until(lambda: gate.arrived == 3)
    real = panel._watcher

    class Pressed:
        """The watcher's thread, with ■ pressed while it is waited for."""

        times = 0

        def is_alive(self):
            return real.is_alive()

        def join(self, timeout):
            Pressed.times += 1
            if Pressed.times == 1:
                raise KeyboardInterrupt
            gate.let()  # only now: the training has been asked to stop before it can go on
            real.join(timeout)

    panel._watcher = Pressed()
    assert panel.wait(300) == "stopped" and panel.result.steps < STEPS


# ---- other notebooks ----


def test_a_second_panel_watches_stops_and_cannot_start_a_second_training(make, tmp_path):
    gate = Gate(2)
    panel = RunPanel(make(gate=gate))
    panel.start()
    until(lambda: gate.arrived == 3)
    other = RunPanel.attach(tmp_path / "run")
    assert other._source.work is panel._source.work and other.state == "running"
    again = make(run=Run.open(tmp_path / "run"))
    with pytest.raises(RunError, match="is being trained: another training of this process works on it"):
        again.train(resume=True)
    code = f"from ragkit.widgets import RunPanel; p = RunPanel.attach({str(tmp_path / 'run')!r}); print(p.state);"
    code += "p.stop(); print(p.state)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["running", "stopping"], done.stderr
    gate.let()
    assert panel.wait(300) == "stopped" and other.wait(300) == "stopped"
    assert panel.result.stopped


def test_a_run_whose_kernel_is_gone_says_how_to_go_on(make, tmp_path, kill_when, hold):
    folder = tmp_path / "run"
    Run.create(lsr_job.settings(tmp_path), tmp_path, "run")
    hold.at(5)
    kill_when([lsr_job.__file__, folder, "query"], hold.arrived, hold.environment)
    panel = RunPanel.attach(folder)
    assert panel.state == "interrupted" and is_off(panel.resume_button)
    assert "its process is gone" in panel.message and "Make the trainer again with run=Run.open" in panel.message
    panel.resume_button.click()
    assert "trained by Python code, not by a command" in panel.message
    with pytest.raises(RunError, match="Interrupted"):
        panel.run()
    again = RunPanel(make(run=Run.open(folder), refresh_steps=3))
    assert again.state == "interrupted" and not again.resume_button.disabled
    assert again.message.endswith("Press Resume to go on.")
    again.resume()
    assert again.wait(300) == "finished"
    assert losses(Run.open(folder)) == losses(Run.open(make("whole", refresh_steps=3).train().run_dir))


@pytest.fixture
def elsewhere(tmp_path):
    """A run that nobody here trains; `with elsewhere.hold() as held` does it somewhere else."""
    run = Run.create(lsr_job.settings(tmp_path), tmp_path, "run")
    run.log({"step": 1, "total": 9, "loss": 1.0})
    return run


def test_a_panel_follows_and_stops_a_run_that_was_resumed_elsewhere_after_it_stopped_it(elsewhere):
    with elsewhere.hold() as held:
        panel = RunPanel.attach(elsewhere.dir)
        panel.stop()
        assert panel.state == "stopping" and elsewhere.stop_requested
        elsewhere.clear_stop()
        held.end("stopped")
    assert panel.wait(300) == "stopped" and panel._watcher is None
    elsewhere.clear_stop()  # the panel may have asked once more
    with elsewhere.hold() as held:
        panel.resume_button.click()
        assert panel.state == "running" and "goes on already" in panel.message
        assert not panel.stop_button.disabled and panel._watcher.is_alive()
        panel.stop_button.click()
        assert panel.state == "stopping" and elsewhere.stop_requested
        held.end("stopped")
    assert panel.wait(300) == "stopped"


def test_a_closed_panel_no_longer_watches(elsewhere):
    with elsewhere.hold() as held:
        panel, other = RunPanel.attach(elsewhere.dir), RunPanel.attach(elsewhere.dir)
        watcher = panel._watcher
        panel.close()
        watcher.join(300)
        assert not watcher.is_alive() and panel.comm is None
        assert other._watcher.is_alive() and other.state == "running"
        held.end("finished")
    assert other.wait(300) == "finished"


def test_what_a_trainer_does_after_its_training_is_no_start(make):
    trainer, done, let = make(), threading.Event(), threading.Event()
    train = trainer.train

    def train_and_encode(resume=False):
        found = train(resume)
        done.set()
        assert let.wait(300)
        return found

    trainer.train = train_and_encode
    panel = RunPanel(trainer)
    panel.start()
    assert done.wait(300)
    until(lambda: panel._status.name == "ending")
    panel._refresh()
    assert panel.state == "running" and is_off(panel.stop_button)
    assert panel.message.startswith("The training itself is done. Keeping the weights, and encoding the passages anew")
    panel.stop_button.click()
    assert "the training itself is done" in panel.message
    panel._source.work.stop()
    assert not Run(panel.run_dir).stop_requested
    let.set()
    assert panel.wait(300) == "finished" and panel.result.steps == STEPS


def test_an_error_is_forgotten_once_the_run_was_gone_on_with_elsewhere(make):
    trainer = make()
    trainer._rows_of = lambda *args: 1 / 0
    panel = RunPanel(trainer)
    panel.start()
    assert panel.wait(300) == "failed" and panel._source.work.error is not None
    with Run(panel.run_dir).hold() as held:
        held.end("finished")
    panel._refresh()
    assert panel.state == "finished" and panel._source.work.error is None


# ---- what is wrong with files ----


def test_a_run_folder_deleted_while_it_trains(make, tmp_path):
    gate = Gate(2)
    panel = RunPanel(make(gate=gate))
    panel.start()
    until(lambda: gate.arrived == 3 and panel.state == "running")
    shutil.rmtree(tmp_path / "run")
    until(lambda: panel.state == "missing")
    assert "is gone: it was deleted or moved" in panel.message
    gate.let()
    panel.wait(300)
    assert panel.state == "missing" and is_off(panel.resume_button)
    with pytest.raises(RunError, match="is gone"):
        panel.run()
    panel.start_button.click()  # a new folder of the same name
    assert panel.wait(300) == "finished"


def test_a_run_folder_deleted_afterwards(make, tmp_path):
    panel = RunPanel(make())
    panel.run()
    shutil.rmtree(tmp_path / "run")
    panel.resume_button.click()
    assert panel.state == "missing" and panel.table is None
    with pytest.raises(RunError, match="there is no run folder"):
        RunPanel.attach(tmp_path / "run")


@pytest.mark.parametrize("line", ['{"step": 1, "lo', "nonsense\n", '"text"\n', '{"step": "x"}\n', "\0\0\n"])
def test_a_damaged_events_file_is_shown_as_far_as_it_can_be_read(make, line):
    panel = RunPanel(make())
    panel.run()
    path = Run(panel.run_dir).events_path
    text = path.read_text()
    path.write_text(text[: text.index("\n") + 1] + line + ("\n" if not line.endswith("\n") else "") + text)
    other = RunPanel(make(run=Run(panel.run_dir)))
    assert other.state == "finished" and other._status.step == STEPS
    assert "1 line of events.jsonl cannot be read" in other.display.log.value


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(make, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    panel = RunPanel(make(output_dir=str(tmp_path / "locked")))
    panel.start_button.click()
    assert "choose one that you may write to" in panel.message


def test_a_folder_that_is_a_file(make, tmp_path):
    (tmp_path / "file").write_text("")
    panel = RunPanel(make(), score=None)
    panel._source.work.trainer.config.output_dir = str(tmp_path / "file")
    panel.start_button.click()
    assert panel.state == "ready" and "choose one that you may write to and that has room" in panel.message


# ---- what it is given ----


def test_what_a_panel_is_not_for(make):
    with pytest.raises(RunError, match="found QueryConfig, expected the settings of a training: LSRConfig"):
        RunPanel(QueryConfig())
    with pytest.raises(RunError, match="found str, expected a ConfigForm"):
        RunPanel("runs/a")
    with pytest.raises(RunError, match="processes goes with settings"):
        RunPanel(make(), processes=2)
    with pytest.raises(RunError, match="score goes with a trainer"):
        RunPanel(LSRConfig(), score=lambda: None)


def test_a_form_with_wrong_fields_is_not_started(tmp_path):
    class Form:
        config = LSRConfig(output_dir=str(tmp_path))
        errors = [Problem("train.batch_size", 0, "1 or more")]

    panel = RunPanel(Form())
    panel.start_button.click()
    assert panel.state == "ready" and list(tmp_path.iterdir()) == []
    assert panel.message == ("not started: the form has 1 wrong field: train.batch_size: found 0, expected 1 or more")
    panel.estimate_button.click()
    assert "1 wrong field" in panel.message


def test_the_static_form_is_the_same_each_time_and_names_no_path(make):
    panel = RunPanel(LSRConfig(gamma=0.2), processes=2)
    bundle = panel._repr_mimebundle_()
    assert bundle["text/plain"] == (
        "RunPanel: python -m ragkit lsr, trained in 2 processes of torchrun\nstate: ready\n"
        f"runs: {as_command(LSRConfig(gamma=0.2), 'lsr', 2)}\nin code: panel.run() starts it and waits for its end"
    )
    assert "gamma=0.2" in bundle["text/html"] and "panel.run()" in bundle["text/html"]
    assert RunPanel(LSRConfig(gamma=0.2), processes=2)._repr_mimebundle_()["text/html"] == bundle["text/html"]
    assert "LSRTrainer, trained in this kernel" in RunPanel(make()).static_text()


def test_without_ipywidgets_it_says_what_to_install():
    code = "import sys; sys.modules['ipywidgets'] = None\nimport ragkit.widgets\nragkit.widgets.RunPanel"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert 'install it with: pip install "ragkit[notebooks]"' in done.stderr


def test_latest_says_where_it_looked(tmp_path):
    with pytest.raises(RunError, match="there is no run of the command lsr in"):
        RunPanel.latest(tmp_path, "lsr")
    with pytest.raises(RunError, match="there is no run in"):
        RunPanel.latest(tmp_path / "none")


def test_latest_finds_the_newest_run_of_a_command(make, tmp_path):
    RunPanel(make("a")).run()
    Run.create(LSRConfig(), tmp_path, "b")
    from ragkit.config import RALTConfig

    Run.create(RALTConfig(), tmp_path, "c")
    now = time.time()
    for place, name in enumerate("abc"):
        for file in ("config.yaml", "state.json"):
            if (tmp_path / name / file).exists():
                os.utime(tmp_path / name / file, (now + place, now + place))
    assert RunPanel.latest(tmp_path, "lsr").run_dir.name == "b"
    assert RunPanel.latest(tmp_path).run_dir.name == "c"
    os.utime(tmp_path / "a" / "state.json", (now + 9, now + 9))
    found = RunPanel.latest(tmp_path)
    assert found.run_dir.name == "a" and found.state == "finished"


# ---- words ----


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "less than a minute"),
        (50, "about 1 minute"),
        (100, "about 2 minutes"),
        (5390, "about 90 minutes"),
        (7300, "about 2 hours"),
        (200_000, "about 2 days"),
    ],
)
def test_time_in_words(seconds, words):
    assert rough_duration(seconds) == words


def test_progress_in_words(tmp_path):
    events = EventReader(tmp_path / "events.jsonl")
    assert run_view.progress_words(RunState("running"), events, True) == ""
    (tmp_path / "events.jsonl").write_text(
        json.dumps({"step": 5, "total": 1200, "loss": 1.0, "remaining": 240}) + "\n"
    )
    events.read()
    state = RunState("running", 5, 1200)
    assert run_view.progress_words(state, events, True) == "step 5 of 1,200, about 4 minutes left"
    assert run_view.progress_words(state, events, False) == "step 5 of 1,200"
    assert run_words._sentence("the loss is nan") == "The loss is nan."


def test_every_state_has_a_sign_and_a_word():
    for state in run_view.SIGNS:
        html = run_view.state_html(state, "said <b>")
        assert state in html.lower() and "said &lt;b&gt;" in html and run_view.SIGNS[state] in html
    assert len(set(run_view.SIGNS.values())) == len(run_view.SIGNS)
