"""The command line: real runs on an own corpus, the generated help, and what a user sees when something is wrong."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import TORCHRUN
from watching import until

from ragkit import commands, console
from ragkit.commands import BAD_INPUT, COMMANDS, DONE, INTERRUPTED, main
from ragkit.config import DataConfig, EvaluateConfig, LSRConfig, QueryConfig, RALTConfig, load_config
from ragkit.inputs import CommandError, load_questions, open_retrieval, open_system
from ragkit.rag.corpus import Passage
from ragkit.rag.store import StoreError
from ragkit.resuming import settings_of_run
from ragkit.runs import Run
from ragkit.settings import walk
from ragkit.tuning.qa_data import load_qa

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("RAGKIT_SHARED", ROOT.parent / "shared"))
CAPITALS = {"Peru": "Lima", "Ghana": "Accra", "Norway": "Oslo", "Japan": "Tokyo", "Kenya": "Nairobi", "Fiji": "Suva"}
FAST = ("train.max_steps=4", "train.batch_size=2", "train.num_threads=1", "rag.device=cpu")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with an own corpus and own questions, which is the working directory."""
    passages = [{"id": c, "title": c, "text": f"{capital} is the capital of {c}."} for c, capital in CAPITALS.items()]
    passages += [{"id": f"{c} food", "text": f"The markets of {c} sell fish, rice and fruit."} for c in CAPITALS]
    write_jsonl(tmp_path / "corpus.jsonl", passages)
    rows = [
        {"id": c, "question": f"What is the capital of {c}?", "answer": capital, "supporting_facts": [c]}
        for c, capital in CAPITALS.items()
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", [*rows[:3], {**rows[3], "sub_question": True}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own_lm(own, tiny_lm, tokenizer):
    """The settings of a run in `own`, with a random two-layer LM saved there."""
    tiny_lm.save_pretrained(own / "lm")
    tokenizer.save_pretrained(own / "lm")
    data = ["data.corpus=corpus.jsonl", "data.train=train.jsonl", "data.test=test.jsonl"]
    return [*data, "rag.generator=lm", "rag.max_new_tokens=4", *FAST]


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run_here(*arguments): the command line in this process -> (exit status, stdout, stderr).

    It saves the seconds that a process needs to import PyTorch.
    """
    monkeypatch.setattr(commands, "silence_libraries", lambda: None)  # its settings would outlive the test
    threads = torch.get_num_threads()

    def run(*arguments):
        status = main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    yield run
    torch.set_num_threads(threads)


def command_line(*arguments, launcher=("-m", "ragkit"), threads="1"):
    """Arguments of a subprocess, with this repository on its path and no network; threads="": as it chooses."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    env["OMP_NUM_THREADS"] = threads
    if not threads:
        del env["OMP_NUM_THREADS"]
    return {"args": [sys.executable, *launcher, *arguments], "env": env, "text": True}


def run_command(*arguments, **options):
    return subprocess.run(**command_line(*arguments, **options), capture_output=True, timeout=600)


# ---- help and what is wrong ----


def test_the_overview_names_every_command(run_here):
    status, out, _ = run_here("--help")
    assert status == DONE
    assert all(f"  {name} " in out for name in COMMANDS)
    assert run_here()[0] == BAD_INPUT


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_lists_every_setting(run_here, name):
    status, out, _ = run_here(name, "--help")
    assert status == DONE
    for key, field, inner in walk(COMMANDS[name][0]):
        assert f"  {key}.*" in out if inner else f"  {key}  (" in out
        assert " ".join((field.description or "").split()) in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evalute"], 'unknown command "evalute"; did you mean "evaluate"?'),
        (["lsr", "nowhere.yaml"], 'no configuration file "nowhere.yaml"'),
        (["lsr", "a.yaml", "b.yaml"], "2 configuration files"),
        (["lsr", "train.batchsize=4"], 'did you mean "train.batch_size"?'),
        (["lsr", "--train.batch_size", "4"], "is not a setting"),
        (["ralt", "train.batch_size=0"], "train.batch_size: found 0"),
        (["lsr", "top_k=1"], "top_k: found 1"),
        (["evaluate", "data.corpus=nowhere.json"], 'no file or folder "nowhere.json"'),
        (["evaluate", "data.corpus=corpus.jsonl"], "no test questions in corpus.jsonl"),
        (["evaluate", "data.corpus=corpus.jsonl", "data.test=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["evaluate", "data.corpus=corpus.jsonl", "data.test=dev"], 'no file "dev"'),
        (["evaluate", "data.corpus=corpus.jsonl", "data.test=empty.jsonl"], "empty.jsonl: no rows"),
        (["evaluate", "data.corpus=empty.jsonl", "data.test=test.jsonl", "generate=false"], "empty.jsonl is empty"),
        (["query"], 'write question="'),
        (["query", "question=Who?", "system=nowhere"], 'no folder "nowhere"'),
        (["query", "question=Who?", "system=."], "system.json"),
        (["lsr", "resume=nowhere"], 'no run folder "nowhere"'),
        (["lsr", "resume=."], "has no config.yaml"),
        (["ralt", "resume=cut"], "config.yaml"),
    ],
)
def test_wrong_input_is_one_clear_line(own, run_here, arguments, expected):
    (own / "empty.jsonl").write_text("")
    (own / "cut").mkdir()
    (own / "cut" / "config.yaml").write_text("train: {batch_size: [")
    status, _, err = run_here(*arguments)
    assert status == BAD_INPUT
    assert expected in err
    assert err.startswith("ragkit: ") and "Traceback" not in err
    assert "Traceback" in run_here(*arguments, "--traceback")[2]


def test_a_fault_of_the_program_keeps_its_traceback(run_here, monkeypatch):
    monkeypatch.setitem(COMMANDS, "query", (COMMANDS["query"][0], lambda config, out: 1 // 0))
    status, _, err = run_here("query")
    assert status == commands.FAULT
    assert "ZeroDivisionError" in err


def test_an_interrupt_outside_training_ends_quietly(run_here, monkeypatch):
    def interrupted(config, out):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "query", (COMMANDS["query"][0], interrupted))
    assert run_here("query") == (INTERRUPTED, "interrupted\n", "")


def test_a_resumed_run_must_go_on_as_it_began(own, run_here):
    run = Run.create(LSRConfig(gamma=0.2), "runs", "mine")
    status, _, err = run_here("lsr", f"resume={run.dir}", "gamma=0.3")
    assert status == BAD_INPUT and "other values of gamma (gamma=0.2, now 0.3)" in err
    assert settings_of_run(run, LSRConfig(resume=str(run.dir), gamma=0.2), "lsr").gamma == 0.2
    # A default that was asked for counts, one that was not does not.
    run = Run.create(load_config(LSRConfig, None, ["gamma=0.2", "train.learning_rate=0.001"]), "runs", "more")
    status, _, err = run_here("lsr", f"resume={run.dir}", "gamma=0.05", "train.learning_rate=2e-5")
    assert status == BAD_INPUT and "other values of train.learning_rate, gamma (" in err
    for given in (LSRConfig(resume=str(run.dir)), load_config(LSRConfig, None, ["train.batch_size=16"])):
        assert settings_of_run(run, given, "lsr").train.learning_rate == 1e-3
    other = Run.create(RALTConfig(), "runs", "ralt")
    status, _, err = run_here("lsr", f"resume={other.dir}")
    assert status == BAD_INPUT and "not a run of the command lsr" in err


# ---- questions ----


def test_sub_questions_are_left_out_of_the_test_and_counted(own):
    lines = []
    data = DataConfig(corpus="corpus.jsonl", train="test.jsonl", test="test.jsonl")
    test = load_questions(data, "test", lines.append)
    assert [example.id for example in test] == ["Peru", "Ghana", "Norway"]
    assert lines == ["left out of the test: 1 rows marked sub_question (whole questions only)"]
    assert len(load_questions(data, "train")) == 4  # training keeps them
    data.max_test = 2
    assert len(load_questions(data, "test", lines.append)) == 2


def test_a_limit_takes_a_sample_of_all_questions():
    questions = load_qa("small_world", split="train")
    ids = [example.id for example in load_questions(DataConfig(max_train=320), "train")]
    assert ids == [example.id for example in questions.sample(320)]  # as a notebook draws them
    places = [n for n, example in enumerate(questions) if example.id in set(ids)]
    assert len(places) == 320 and abs(sum(places) / 320 / len(questions) - 0.5) < 0.05  # from all over the file


def test_questions_come_from_the_corpus_folder_by_split(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "dataset_corpus.json").write_text('{"Peru": "Lima is the capital."}')
    (raw / "dev.json").write_text('[{"id": "d", "question": "Capital?", "answer": "Lima"}]')
    for corpus in (tmp_path, raw, raw / "dataset_corpus.json"):
        data = DataConfig(corpus=str(corpus), test="dev")
        assert [example.id for example in load_questions(data, "test")] == ["d"]
        assert load_questions(DataConfig(corpus=str(corpus)), "test", required=False) is None
    with pytest.raises(CommandError, match="no train questions"):
        load_questions(DataConfig(corpus=str(tmp_path)), "train")


# ---- a saved system brings its own settings ----


def test_settings_without_effect_on_a_saved_system_are_refused(own, own_lm, run_here):
    saved = open_system(load_config(LSRConfig, None, [*own_lm, "rag.top_k=2"]), print).save("saved")
    same = ["system=saved", "rag.generator=lm", "rag.device=cpu"]
    status, _, err = run_here("query", *same, "question=Who?", "rag.max_new_tokens=5", "rag.prompt=plain")
    assert status == BAD_INPUT
    assert "rag.prompt, rag.max_new_tokens: no effect with system=saved" in err and "rag.prompt='sources'" in err
    # Asking for the default of a setting that was saved with another value is asking for a change too.
    assert "rag.max_new_tokens: no" in run_here("query", *same, "question=Who?", "rag.max_new_tokens=32")[2]
    assert open_system(load_config(QueryConfig, None, same), print).config.top_k == 2
    changed = open_system(load_config(QueryConfig, None, [*same, "rag.top_k=3"]), print)
    assert (changed.config.top_k, changed.config.max_new_tokens, saved.name) == (3, 4, "saved")


# ---- the lines of a training ----


def test_the_first_interrupt_asks_the_run_to_stop_the_second_ends_it(tmp_path):
    run = Run.create(LSRConfig(), tmp_path, "r")
    lines = []
    before = signal.getsignal(signal.SIGINT)
    with console.stop_on_interrupt(run, lines.append) as pressed:
        assert not pressed
        os.kill(os.getpid(), signal.SIGINT)
        assert pressed and run.stop_requested and len(lines) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_step_lines_are_few_and_end_with_the_last_step():
    from ragkit.engine import logger

    lines = []
    with console.step_lines(lines.append, lines=4):
        for step in range(1, 101):
            logger.info("step %d/%d %s", step, 100, "loss 0.5 grad_norm 1 epoch 0.1")
        logger.warning("look here")
    assert [line.split()[1] for line in lines[:-1]] == ["1/100", "26/100", "51/100", "76/100", "100/100"]
    assert "loss 0.5  grad_norm 1  (" in lines[0] and lines[-1] == "  note: look here"
    assert not logger.handlers


# ---- real runs ----


def test_scoring_retrieval_leaves_a_collection_of_other_passages_alone(own):
    from ragkit.rag.qdrant import QdrantStore

    other = Passage("mine", "Only here.")
    store = QdrantStore(path=own / "q")
    store.add([other], torch.ones(1, 384))
    store.close()
    rag = {"store": "qdrant", "qdrant_path": "q", "device": "cpu"}
    config = EvaluateConfig(data={"corpus": "corpus.jsonl"}, rag=rag)
    with pytest.raises(StoreError, match="holds other passages already, for example 'mine'") as caught:
        open_retrieval(config, print)
    del caught
    gc.collect()  # lets go of the folder
    store = QdrantStore(path=own / "q")
    assert list(store.passages()) == [other]
    store.close()


@pytest.mark.slow
def test_lsr_then_query_and_evaluate_on_own_files(own, own_lm, run_here):
    done = run_command("lsr", *own_lm, "name=mine", "train.learning_rate=1e-4")
    assert done.returncode == 0, done.stderr
    assert "learning_rate: 0.0001" in done.stdout  # the resolved settings
    assert "12 passages, 6 training questions, 3 test questions" in done.stdout
    assert "recall@1" in done.stdout and "step 4/4" in done.stdout
    assert "Traceback" not in done.stderr and "it/s" not in done.stderr
    run = Run.open(own / "runs" / "mine")
    assert {"before_mrr", "after_mrr", "loss"} <= run.metrics().keys()
    hint = done.stdout.split("use it:")[1]
    assert f"system={Path('runs/mine/system')}" in hint

    answered = run_command("query", "system=runs/mine/system", 'question=["What is the capital of Peru?", "Who?"]')
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.count("question: ") == 2 and "  1. " in answered.stdout and "Peru" in answered.stdout

    status, _, err = run_here("evaluate", "system=runs/mine/system", *own_lm[:3], "output=scores.json", "ks=[1,2]")
    assert status == DONE, err
    scores = json.loads((own / "scores.json").read_text())
    assert scores["ids"] == ["Peru", "Ghana", "Norway"] and {"recall@1", "em", "f1"} <= scores["metrics"].keys()
    # What evaluate reads back is what lsr scored after training.
    assert scores["metrics"]["mrr"]["mean"] == pytest.approx(run.metrics()["after_mrr"])


@pytest.mark.parametrize(("command", "value"), [("lsr", "eval_recall@1"), ("ralt", "eval_loss")])
def test_the_test_questions_are_scored_while_training(own, own_lm, run_here, command, value):
    given = [*own_lm, "train.max_steps=2", "train.num_threads=null"]
    status, _, err = run_here(command, *given, "train.eval_steps=1", "name=mine")
    assert status == DONE, err
    run = Run.open("runs/mine")
    assert [event["step"] for event in run.events() if value in event] == [1, 2]
    # A resumed run has to use as many threads; the number is in its settings.
    assert run.config()["train"]["num_threads"] == torch.get_num_threads()


def test_what_a_training_refuses_leaves_no_run_folder(own, own_lm, run_here):
    without = [setting for setting in own_lm if not setting.startswith("data.test")]
    status, _, err = run_here("ralt", *without, "train.eval_steps=1")
    assert status == BAD_INPUT and "name a file: data.test=FILE.jsonl" in err
    status, _, err = run_here("lsr", *own_lm, "train.gradient_checkpointing=true")
    assert status == BAD_INPUT and "train.gradient_checkpointing" in err
    assert not (own / "runs").exists()


@pytest.mark.slow
def test_ralt_goes_on_from_a_saved_system(own, own_lm, run_here):
    status, out, err = run_here("ralt", *own_lm, "name=first", "train.learning_rate=1e-2")
    assert status == DONE, err
    assert "parameters are trained" in out and "em" in out
    saved = "system=runs/first/system"
    status, _, err = run_here("ralt", *own_lm, "name=second", saved, "method=lora", "rag.top_k=2")
    assert status == DONE, err
    assert (own / "runs" / "second" / "system").is_dir()
    # The settings of the run are those it worked with, and it can be resumed with them.
    assert load_config(RALTConfig, own / "runs" / "second" / "config.yaml").rag.top_k == 2
    status, _, err = run_here("ralt", "resume=runs/second")
    assert status == DONE, err


@pytest.mark.slow
def test_an_interrupted_training_resumes(own, own_lm, run_here, held):
    given = [*own_lm, "train.max_steps=20", "name=mine"]
    held.at(3)
    process = subprocess.Popen(**command_line("lsr", *given), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: held.arrived() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    held.let_go()
    out, err = process.communicate(timeout=300)
    assert process.returncode == INTERRUPTED, err
    assert "python -m ragkit lsr resume=" in out and "Traceback" not in err
    assert Run.open(own / "runs" / "mine").events()[-1]["step"] == 4

    status, _, err = run_here("lsr", "resume=runs/mine")
    assert status == DONE, err
    steps = [event["step"] for event in Run.open(own / "runs" / "mine").events() if event.get("loss") is not None]
    assert steps == list(range(1, 21))
    assert (own / "runs" / "mine" / "system").is_dir()


@pytest.mark.slow
def test_a_killed_training_goes_on_as_if_it_had_not_been(own, own_lm, run_here, held):
    given = [*own_lm, "train.max_steps=16", "train.learning_rate=1e-3"]
    status, _, err = run_here("lsr", *given, "name=unbroken", "train.save_steps=null")
    assert status == DONE, err

    given += ["name=mine", "train.save_steps=2", "train.num_threads=null"]
    held.at(7)
    process = subprocess.Popen(**command_line("lsr", *given), stdout=subprocess.PIPE)
    until(lambda: held.arrived() or process.poll() is not None)
    process.kill()
    process.communicate()
    held.let_go()
    assert process.returncode == -signal.SIGKILL  # it had not ended by itself
    run = Run(own / "runs" / "mine")
    assert run.events()[-1]["step"] == 7 and run.last_checkpoint().name == "checkpoint-6"

    resumed = run_command("lsr", "resume=runs/mine")
    assert resumed.returncode == 0, resumed.stderr
    assert "starts again" not in resumed.stdout + resumed.stderr

    def losses(run):
        return [(event["step"], event["loss"]) for event in run.events() if event.get("loss") is not None]

    wanted = losses(Run.open(own / "runs" / "unbroken"))
    assert losses(Run.open(run.dir)) == wanted
    assert len(wanted) == 16 and len({loss for _, loss in wanted}) > 10


@pytest.mark.slow
def test_two_processes_share_one_run_and_one_speaks(own, own_lm):
    launcher = (*TORCHRUN[1:], "-m", "ragkit")
    done = run_command("lsr", *own_lm, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("passages, 6 training questions") == 1
    assert done.stdout.count("run folder:") == 1
    folders = sorted(path.name for path in (own / "runs").iterdir())
    assert folders[0] == "lm_scores" and len(folders) == 2  # beside the one run, what the LM said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("wiki2_mini", {"recall@2": 0.584, "recall@5": 0.699, "recall@10": 0.724}),
        pytest.param(
            "hotpot_mini", {"recall@2": 0.608, "recall@5": 0.755, "recall@10": 0.853}, marks=pytest.mark.long
        ),
    ],
)
def test_evaluate_reproduces_the_dense_baseline(tmp_path, name, published):
    """The `minilm` rows of shared/data/BASELINES.md, with the settings as they stand (160 tokens a passage)."""
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set RAGKIT_SHARED")
    output = tmp_path / "scores.json"
    done = run_command(
        "evaluate",
        f"data.corpus={folder}",
        "generate=false",
        "ks=[2,5,10]",
        f"output={output}",
        threads="",
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads(output.read_text())["metrics"]
    assert {key: scores[key]["mean"] for key in published} == pytest.approx(published, abs=0.005)


def test_settings_of_the_commands_are_distinct_classes():
    assert len({kind for kind, _ in COMMANDS.values()}) == len(COMMANDS)
    assert commands.command_of(EvaluateConfig()) == "evaluate"
