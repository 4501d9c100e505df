"""gfm-pretrain, gfm-finetune and gfm-evaluate: what they print and leave behind, and what is said when something is
wrong. Most use a toy encoder; two are real processes with the real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import finetune_job
import pretrain_job
import pytest
import torch
import yaml
from launching import TORCHRUN
from watching import losses, until

from ragkit import commands
from ragkit.commands import BAD_INPUT, DONE, INTERRUPTED, main
from ragkit.gfm import GFMSettings, GNNRetriever, QueryGNN, load_gfm, save_gfm
from ragkit.runs import Run

ROOT = Path(__file__).parents[1]


MODEL = ("model.entity_model.input_dim=8", "model.entity_model.hidden_dims=[8,8]", "device=cpu")
FAST = ("datasets.root=.", "datasets.cache=false", "train.num_threads=1", "train.batch_size=4", *MODEL)
PRETRAIN = ("gfm-pretrain", *FAST, "datasets.train_names=[facts]", "task.num_negative=4", "task.valid_share=0.1")
FINETUNE = ("gfm-finetune", *FAST, "datasets.train_names=[left]", "datasets.valid_share=0.2")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with the data sets "left" (questions) and "facts" (none)."""
    finetune_job.write_dataset(tmp_path / "left", people=12, seed=1, train=22, test=9)
    pretrain_job.family(17, seed=1).save(tmp_path / "facts")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_here(folder, monkeypatch, capsys):
    """run_here(*arguments): the command line here, with the toy encoder -> (exit status, stdout, stderr)."""
    from ragkit.gfm import finetune, pretrain, text_encoder

    monkeypatch.setattr(commands, "silence_libraries", lambda: None)  # its settings would outlive the test
    for module in (finetune, pretrain, text_encoder):
        monkeypatch.setattr(module, "open_encoder", lambda config, device: finetune_job.WordEncoder())
    threads = torch.get_num_threads()

    def run(*arguments):
        status = main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    yield run
    torch.set_num_threads(threads)


def settings_printed(out):
    """The resolved settings: the lines up to the first empty one."""
    return yaml.safe_load(out.split("\n\n")[0])


# ---- end to end ----


def test_pretrain_shows_what_it_does_and_where_it_is(run_here):
    status, out, err = run_here(*PRETRAIN, "train.num_epoch=2", "name=pre")
    assert (status, err) == (DONE, "")
    settings = settings_printed(out)
    assert settings["train"]["batch_size"] == 4 and settings["train"]["watched_metric"] == "mrr"
    assert settings["model"]["entity_model"]["hidden_dims"] == [8, 8]
    assert "facts: 17 entities, 3 relations, " in out and "triples; 5 more are held out to score" in out
    assert "model: 2 layers of 8, " in out and "parameters, on cpu" in out
    assert "scoring 5 held-out triples (before)" in out and "scoring 5 held-out triples (after)" in out
    assert out.count("estimate: ") == 1 and " for the " in out and "peak memory" in out
    assert "step 1/" in out and "eval_mrr" in out and "these weights are kept" in out
    run = Run.open("runs/pre")
    table = [line.split() for line in out.splitlines() if line.startswith(("mrr", "mr ", "hits@"))]
    assert [row[0] for row in table] == ["mrr", "mr", "hits@1", "hits@3", "hits@10"]
    assert float(table[0][2]) == pytest.approx(run.metrics()["after/facts/mrr"], abs=6e-4)
    assert "run folder: runs/pre" in out.replace(os.sep, "/") and "Traceback" not in out
    assert isinstance(load_gfm(run.dir / "model"), QueryGNN)
    assert "gfm-finetune train.checkpoint=runs/pre/model" in out.replace(os.sep, "/")


def test_finetune_then_evaluate(run_here, folder):
    assert run_here(*PRETRAIN, "train.max_steps=4", "name=pre")[0] == DONE
    start = ("train.checkpoint=runs/pre/model", "train.num_epoch=2", "name=mine")
    status, out, err = run_here(*FINETUNE, *start)
    assert (status, err) == (DONE, "")
    assert settings_printed(out)["train"]["checkpoint"] == "runs/pre/model"
    assert "left: 12 entities, 3 relations, 36 triples, 12 documents, " in out and " training questions" in out
    assert "validation: " in out and "test: 9 of left" in out and "scoring 9 test questions (before)" in out
    assert "new (random) parameters, to be trained: question_mlp.weight, question_mlp.bias" in out
    assert "best doc_recall@5 " in out and out.count("estimate: ") == 1
    table = out.split("\nmetric ")[1].splitlines()
    shown = [line.split()[0] for line in table if line.startswith(("doc_", "ent_"))]
    wanted = [f"{what}_recall@{k}" for what in ("doc", "ent") for k in (1, 2, 5, 10, 20)]
    assert sorted(shown) == sorted([*wanted, "doc_mrr", "ent_mrr"])
    assert "gfm-evaluate checkpoint=runs/mine/model" in out.replace(os.sep, "/")
    run = Run.open("runs/mine")
    whole = json.loads((run.dir / "evaluation.json").read_text())["left"]
    assert {"doc_all@5", "ent_filtered_mrr"} <= whole["after"]["metrics"].keys()
    assert whole["before"]["ids"] == whole["after"]["ids"] and len(whole["after"]["ids"]) == 9

    given = ("gfm-evaluate", "checkpoint=runs/mine/model", "datasets.root=.", "datasets.train_names=[left]")
    status, out, err = run_here(*given, "datasets.cache=false", "device=cpu", "output=scores.json")
    assert (status, err) == (DONE, "")
    assert "left: 12 entities" in out and "9 questions" in out
    assert "idf_topk" in out and "score_weighted_idf" in out
    assert out.count("ent_mrr") == 1 and out.count("doc_filtered_hits@2 ") == 1
    scores = json.loads((folder / "scores.json").read_text())["left"]
    assert scores["idf_topk"]["values"] == whole["after"]["values"]  # what is read back is what was trained
    assert scores["score_weighted_idf"]["values"]["ent_mrr"] == whole["after"]["values"]["ent_mrr"]
    status, out, _ = run_here(*given, "datasets.cache=false", "device=cpu", "rankers=[simple]", "datasets.max_test=4")
    assert status == DONE and "95 % interval" in out and "4 questions" in out


def test_a_watched_metric_that_is_not_shown_otherwise_is_in_the_table(run_here):
    status, out, _ = run_here(*FINETUNE, "train.max_steps=2", "train.watched_metric=ent_filtered_mrr")
    assert status == DONE and "\nent_filtered_mrr " in out


def test_nothing_to_choose_by_or_to_score(run_here):
    status, out, _ = run_here(*FINETUNE, "train.max_steps=2", "datasets.valid_share=0", "datasets.test_names=[]")
    assert (
        status == DONE and "the last weights are kept" in out and "scoring" not in out and "metric" not in out[1500:]
    )
    status, out, _ = run_here(*PRETRAIN, "train.max_steps=2", "task.valid_share=0")
    assert status == DONE and "none is held out" in out and "the last weights are kept" in out and "scoring" not in out


def test_a_file_with_settings_and_overrides(run_here, folder):
    text = "train: {batch_size: 3, max_steps: 2, log_interval: 2}\ntask: {num_negative: 5}\nseed: 7\n"
    (folder / "mine.yaml").write_text(text)
    status, out, _ = run_here(PRETRAIN[0], "mine.yaml", *PRETRAIN[1:], "train.batch_size=2", "name=x")
    settings = settings_printed(out)
    assert status == DONE and (settings["seed"], settings["train"]["log_interval"]) == (7, 2)
    assert (settings["train"]["batch_size"], settings["task"]["num_negative"]) == (2, 4)  # what was written wins
    assert Run.open("runs/x").config() == {**settings, "name": "x"}
    # The settings of a run start the same one again.
    status, again, _ = run_here("gfm-pretrain", "runs/x/config.yaml", "name=y")
    assert status == DONE and losses("runs/x") == losses("runs/y")


@pytest.mark.parametrize("given", [PRETRAIN, FINETUNE])
def test_a_stopped_run_goes_on_with_its_own_settings(run_here, monkeypatch, given):
    """Ctrl-C itself is in the test of a real process below."""
    from ragkit.gfm.training import GFMTraining

    assert run_here(*given, "train.num_epoch=2", "name=unbroken")[0] == DONE
    run_training = GFMTraining.train

    def stopped_soon(self, resume=False):
        make_batch, made = self.make_batch, []

        def make(key):
            made.append(key)
            if len(made) == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return make_batch(key)

        self.make_batch = make
        return run_training(self, resume)

    with monkeypatch.context() as patch:
        patch.setattr(GFMTraining, "train", stopped_soon)
        status, out, _ = run_here(*given, "train.num_epoch=2", "name=mine")
    assert status == INTERRUPTED
    assert "stopping after this step, with a checkpoint" in out
    assert f"go on with: python -m ragkit {given[0]} resume=runs/mine" in out.replace(os.sep, "/")
    status, _, err = run_here(given[0], "resume=runs/mine", "train.batch_size=5")
    assert status == BAD_INPUT and "other values of train.batch_size (train.batch_size=4, now 5)" in err
    other = "gfm-finetune" if given is PRETRAIN else "gfm-pretrain"
    status, _, err = run_here(other, "resume=runs/mine")
    assert status == BAD_INPUT and f"is not a run of the command {other}" in err
    status, out, err = run_here(given[0], "resume=runs/mine", "train.batch_size=4")
    assert (status, err) == (DONE, "") and "going on in runs" in out
    assert losses("runs/mine") == losses("runs/unbroken")
    first, second = (load_gfm(f"runs/{name}/model").state_dict() for name in ("mine", "unbroken"))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    before, after = (Run.open(f"runs/{name}").metrics() for name in ("mine", "unbroken"))
    assert {k: v for k, v in before.items() if "/" in k} == {k: v for k, v in after.items() if "/" in k}
    assert run_here(given[0], "resume=runs/mine")[0] == DONE  # at its end already


# ---- what is wrong ----


@pytest.fixture
def broken(folder):
    """Checkpoints and data sets with one thing wrong each."""
    torch.manual_seed(0)
    save_gfm(GNNRetriever(GFMSettings(rel_emb_dim=9, input_dim=4, hidden_dims=[4])), folder / "nine", "words")
    save_gfm(QueryGNN(GFMSettings(rel_emb_dim=5, input_dim=4, hidden_dims=[4])), folder / "pretrained", "words")
    save_gfm(GNNRetriever(GFMSettings(rel_emb_dim=5, input_dim=4, hidden_dims=[4])), folder / "cut", "words")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    finetune_job.write_dataset(folder / "strange", people=12, seed=3)
    train = folder / "strange" / "processed" / "stage1" / "train.json"
    rows = json.loads(train.read_text())
    train.write_text(json.dumps([{**row, "question_entities": ["nobody"]} for row in rows]))
    (folder / "bad.yaml").write_text("train: {batch_sise: 4}\n")
    return folder


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*FINETUNE, "train.batchsize=4"], 'did you mean "train.batch_size"?'),
        (["gfm-finetune", "bad.yaml"], 'did you mean "train.batch_size"?'),
        ([*PRETRAIN, "task.num_negatives=4"], 'did you mean "task.num_negative"?'),
        ([*PRETRAIN, "doc_ranker.name=idf"], "doc_ranker"),
        ([*FINETUNE, "train.batch_size=0"], "train.batch_size: found 0"),
        ([*FINETUNE, "datasets.train_names=[lefft]"], 'there is no data set "lefft": '),
        ([*PRETRAIN, "datasets.train_names=[fact]"], 'did you mean "facts"?'),
        ([*PRETRAIN, "datasets.root=nowhere", "datasets.train_names=[x]"], "datasets.root=nowhere is no folder"),
        ([*PRETRAIN, "datasets.train_names=[facts,facts]"], 'the data set "facts" is named twice'),
        ([*FINETUNE, "datasets.train_names=[facts]"], "train.json"),
        ([*FINETUNE, "datasets.train_names=[strange]"], "no question can be used. strange"),
        ([*FINETUNE, "train.checkpoint=nowhere"], "nowhere"),
        ([*FINETUNE, "train.checkpoint=cut"], "model.safetensors"),
        ([*FINETUNE, "train.checkpoint=nine"], "the encoder gives 5 numbers for a text, the model wants 9"),
        ([*PRETRAIN, "train.checkpoint=nine"], "the encoder gives 5 numbers for a text, the model wants 9"),
        ([*FINETUNE, "train.watched_metric=doc_recal@5"], 'did you mean "doc_recall@5"?'),
        ([*PRETRAIN, "train.watched_metric=doc_recall@5"], "expected one of mrr, mr, hits@1"),
        ([*FINETUNE, "resume=nowhere"], 'no run folder "nowhere"'),
        (["gfm-evaluate"], "checkpoint: there is none; write checkpoint=runs/NAME/model"),
        (["gfm-evaluate", "checkpoint=nowhere"], "nowhere"),
        (["gfm-evaluate", "checkpoint=cut"], "model.safetensors"),
        (["gfm-evaluate", "checkpoint=pretrained"], "is pre-trained only, and has nothing yet that reads a question"),
        (["gfm-evaluate", "checkpoint=nine", *FAST[:2], "datasets.test_names=[left]"], "the model wants 9"),
        (["gfm-evaluate", "checkpoint=nine", *FAST[:2], "datasets.test_names=[facts]"], "test.json"),
        (["gfm-evaluate", "checkpoint=nine", *FAST[:2], "datasets.test_names=[right]"], 'no data set "right"'),
        (["gfm-evaluate", "checkpoint=nine", "rankers=[idf_top]"], "rankers"),
    ],
)
def test_wrong_input_is_one_clear_line(broken, run_here, arguments, expected):
    status, _, err = run_here(*arguments)
    assert status == BAD_INPUT and expected in err
    lines = err.splitlines()
    # Why not one of the rows can be used takes more than a line, and comes with examples.
    assert err.startswith("ragkit: ") and "Traceback" not in err and (len(lines) == 1 or "of 36 questions" in lines[0])
    assert not (broken / "runs").exists()
    assert "Traceback" in run_here(*arguments, "--traceback")[2]


# ---- real processes, with the real encoder ----


def command_line(*arguments, launcher=("-m", "ragkit")):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return {"args": [sys.executable, *launcher, *arguments], "env": env, "text": True}


@pytest.mark.slow
def test_an_interrupted_pre_training_resumes(folder, held):
    given = (*PRETRAIN, "train.max_steps=2000", "train.do_eval=false", "name=mine")
    held.at(3)
    process = subprocess.Popen(**command_line(*given), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: held.arrived() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    held.let_go()
    out, err = process.communicate(timeout=300)
    assert process.returncode == INTERRUPTED, err
    assert "go on with: python -m ragkit gfm-pretrain resume=" in out and err == ""
    run = Run.open(folder / "runs" / "mine")
    assert run.events()[-1]["step"] == 4 and run.last_checkpoint().name == "checkpoint-4"


@pytest.mark.slow
def test_two_processes_share_one_run_and_one_speaks(folder):
    launcher = (*TORCHRUN[1:], "-m", "ragkit")
    done = subprocess.run(
        **command_line(*FINETUNE, "train.max_steps=6", "name=mine", launcher=launcher),
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder:") == done.stdout.count("test: 9 of left") == 1
    assert done.stdout.count("step 6/6") == 2  # its loss and its evaluation
    assert [path.name for path in (folder / "runs").iterdir()] == ["mine"]
    assert {"before/left/doc_mrr", "after/left/doc_mrr"} <= Run.open("runs/mine").metrics().keys()
    facts = load_gfm("runs/mine/model").encoder_info
    assert facts["normalize"] is True and facts["text_emb_model_name"]
