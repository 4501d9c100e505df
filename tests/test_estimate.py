"""Estimates: counts against what a training really does, nothing touched, JSON, and what is said of wrong input."""

from __future__ import annotations

import copy
import json
import math
import mmap
import random
import subprocess
import sys
from pathlib import Path

import finetune_job
import numpy as np
import pretrain_job
import pytest
import torch
from torch import nn
from watching import losses, until

from ragkit.config import ConfigError, EvaluateConfig, LSRConfig, RALTConfig
from ragkit.estimate import Estimate, estimate, memory, warm_up
from ragkit.estimate import __main__ as line
from ragkit.estimate.command import SomeEncoded, some_encoded
from ragkit.estimate.measured import steps_of, times
from ragkit.estimate.warm_up import Clock, seconds_each, twin
from ragkit.gfm.text_encoder import encoder_identity
from ragkit.tuning.lsr import LSRTrainer
from ragkit.tuning.qa_data import DataError
from ragkit.tuning.ralt import RALTTrainer
from ragkit.units import duration, size

ROOT = Path(__file__).parents[1]
CAPITALS = {"Peru": "Lima", "Ghana": "Accra", "Norway": "Oslo", "Japan": "Tokyo", "Kenya": "Nairobi", "Fiji": "Suva"}
PASSAGES = [{"id": c, "text": f"{capital} is the capital of {c}."} for c, capital in CAPITALS.items()]
PASSAGES += [{"id": f"{c} food", "text": f"The markets of {c} sell fish, rice and fruit."} for c in CAPITALS]
ROWS = [
    {"id": c, "question": f"What is the capital of {c}?", "answer": capital, "supporting_facts": [c]}
    for c, capital in CAPITALS.items()
]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No second of steps where a few do, one thread, and temporary folders where they are seen."""
    monkeypatch.setattr(warm_up, "ENOUGH", 1e-9)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_system(minilm, tiny_lm, tokenizer):
    """make_system(): the same small system each time."""
    from ragkit.config import RAGConfig
    from ragkit.rag.generator import Generator
    from ragkit.rag.retriever import DenseRetriever
    from ragkit.rag.system import RAGSystem

    def make():
        config = RAGConfig(prompt="plain", device="cpu", max_new_tokens=4)
        generator = Generator(copy.deepcopy(tiny_lm), tokenizer, device="cpu", max_new_tokens=4)
        retriever = DenseRetriever(copy.deepcopy(minilm.model), device="cpu")
        return RAGSystem.from_documents(PASSAGES, config, retriever=retriever, generator=generator)

    return make


def train(**settings):
    return {"batch_size": 2, "num_epochs": 2, "num_threads": 1, "save_steps": 3, **settings}


def lsr(system, **settings):
    config = LSRConfig(**{"top_k": 4, "train": train(), "output_dir": "runs", **settings})
    return LSRTrainer(system, ROWS, config, eval_data=ROWS[:3])


def ralt(system, **settings):
    config = RALTConfig(**{"top_k": 2, "train": train(eval_steps=4), "output_dir": "runs", **settings})
    return RALTTrainer(system, ROWS, config, eval_data=ROWS[:3])


def finetune(root):
    finetune_job.write_two(root)
    return finetune_job.make(finetune_job.config(root, train={"num_epoch": 2, "gradient_accumulation_steps": 2}))


def pretrain(root):
    pretrain_job.write_two(root)
    return pretrain_job.make(pretrain_job.config(root, train={"num_epoch": 1.5}))


def models_of(trainer):
    """All modules of a trainer."""
    if hasattr(trainer, "model"):
        return [trainer.model]
    return [trainer.system.retriever.passage_encoder.model, trainer.system.generator.model]


def state_of(trainer):
    """All that an estimate must leave as it is, but for the random numbers: weights, structure, settings."""
    weights = [
        (name, id(p), p.requires_grad, p.grad is None, p.detach().clone())
        for model in models_of(trainer)
        for name, p in model.named_parameters()
    ]
    modes = [[(name, module.training) for name, module in model.named_modules()] for model in models_of(trainer)]
    own = {name: id(value) for name, value in vars(trainer).items()}
    return weights, modes, own, trainer.config.to_yaml(), str(trainer.run)


def same(one, other):
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


# ---- the counts are those of the training, and nothing is touched ----

MAKE = {
    "lsr": lambda make_system, root: lsr(make_system()),
    "lsr, both encoders": lambda make_system, root: lsr(make_system(), train_part="both", refresh_steps=4),
    "ralt": lambda make_system, root: ralt(make_system()),
    "ralt, all weights": lambda make_system, root: ralt(
        make_system(), method="full", context="joined", train=train(gradient_accumulation_steps=2)
    ),
    "fine-tuning": lambda make_system, root: finetune(root),
    "pre-training": lambda make_system, root: pretrain(root),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if "both" in k or "all" in k else k for k in MAKE]
)
def test_counts_are_those_of_the_training_and_nothing_is_touched(kind, make_system, tmp_path, capsys):
    trainer = MAKE[kind](make_system, tmp_path / "one")
    before, folders = state_of(trainer), sorted(path for path in tmp_path.rglob("*"))
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    numbers = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    capsys.readouterr()
    found = estimate(trainer)
    assert capsys.readouterr().out == ""
    assert same(state_of(trainer), before)
    assert sorted(path for path in tmp_path.rglob("*")) == folders
    assert random.getstate() == numbers[0] and torch.equal(torch.get_rng_state(), numbers[1])
    assert np.random.get_state()[1].tolist() == numbers[2]

    untouched = MAKE[kind](make_system, tmp_path / "two")
    result = trainer.train()
    assert losses(result) == losses(untouched.train())
    assert found.steps == result.steps
    if hasattr(trainer, "model"):
        model, count = trainer.model, sum(p.numel() for p in trainer.model.parameters())
    elif kind.startswith("lsr"):
        model = trainer.system.retriever.query_encoder.model
        words = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        count = sum(p.numel() for p in model.parameters()) - sum(m.weight.numel() for m in words)
    else:
        model = trainer.system.generator.model
        count = sum(p.numel() for n, p in model.named_parameters() if kind == "ralt, all weights" or "lora_" in n)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.trained == count
    assert found.gradients_mib == pytest.approx(count * 4 / 2**20) and found.optimizer_mib == 2 * found.gradients_mib
    last = max((result.run_dir / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    on_disk = sum(file.stat().st_size for file in last.rglob("*") if file.is_file()) / 2**20
    # The state of a short run lists fewer steps: a few hundred bytes each.
    assert found.checkpoint_mib == pytest.approx(on_disk, rel=0.05, abs=0.02)
    assert found.checkpoints == len(list((result.run_dir / "checkpoints").iterdir()))
    assert found.memory_mib > found.weights_mib + found.gradients_mib
    assert all(seconds >= 0 for seconds in found.seconds.values()) and found.seconds["training"] > 0
    assert found.warmup_steps >= 4


def test_rows_that_are_there_cost_nothing_more(make_system):
    trainer = lsr(make_system())
    assert estimate(trainer).seconds["prepare"] > 0
    rows = trainer.rows()
    assert estimate(trainer).seconds["prepare"] == 0 and trainer.rows() is rows


@pytest.mark.slow
def test_scores_that_are_kept_are_read(make_system, monkeypatch, tmp_path):
    trainer = lsr(make_system())
    passes = []
    trainer.system.generator.core.register_forward_hook(lambda *given: passes.append(1))
    estimate(trainer)
    fresh = len(passes)
    lsr(trainer.system).rows()
    passes.clear()
    kept = {file: file.read_bytes() for file in (tmp_path / "runs/lm_scores").iterdir()}
    estimate(lsr(trainer.system))
    assert fresh > 0 and not passes
    assert {file: file.read_bytes() for file in (tmp_path / "runs/lm_scores").iterdir()} == kept


def test_an_adapter_that_is_trained_on_is_copied(make_system):
    trainer = ralt(make_system())
    trainer.train()
    before = state_of(trainer)
    assert estimate(trainer).trained == sum(p.numel() for p in trainer.trained_parameters().values())
    assert same(state_of(trainer), before)


# ---- settings ----


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def own(tmp_path, tiny_lm, tokenizer):
    """The settings of a run on own files, as words of a command line."""
    write_jsonl(tmp_path / "corpus.jsonl", PASSAGES)
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "test.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "silent.jsonl", [{**row, "answer": ""} for row in ROWS])
    tiny_lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    data = ["data.corpus=corpus.jsonl", "data.train=train.jsonl", "data.test=test.jsonl"]
    return [*data, "rag.generator=lm", "rag.max_new_tokens=4", "train.batch_size=2", "rag.device=cpu"]


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run_here(*arguments): the command line in this process -> (exit status, stdout, stderr)."""
    monkeypatch.setattr(line, "silence_libraries", lambda: None)  # its settings would outlive the test

    def run(*arguments):
        status = line.main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.mark.parametrize("command", ["lsr", "ralt"])
def test_the_command_line_says_what_a_command_will_take(command, own, run_here, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run_here(command, *own, "train.num_epochs=3", "--json", "found.json")
    assert (status, err) == (0, "")
    rows = 6 if command == "lsr" else 6 * RALTConfig().top_k
    assert f"steps       {math.ceil(rows / 2) * 3}" in out.splitlines()
    assert "time        about " in out and "disk        about " in out
    assert str(Estimate.from_dict(json.loads((tmp_path / "found.json").read_text()))) + "\n" == out
    (tmp_path / "found.json").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_json_alone_is_the_last_line(own, run_here):
    status, out, _ = run_here("lsr", "--json", *own, "train.max_steps=7")
    assert status == 0
    found = Estimate.from_dict(json.loads(out.splitlines()[-1]))
    assert found.steps == 7 and found.seconds["evaluation"] > 0  # before and after


def test_settings_of_a_gfm_leave_the_caches_alone(tmp_path, monkeypatch):
    from ragkit.gfm import text_encoder

    encoded = []
    encode = finetune_job.WordEncoder.encode
    monkeypatch.setattr(text_encoder, "open_encoder", lambda config, device: finetune_job.WordEncoder())
    monkeypatch.setattr(
        finetune_job.WordEncoder,
        "encode",
        lambda self, texts, side: encoded.extend(texts) or encode(self, texts, side),
    )
    monkeypatch.setenv("RAGKIT_CACHE", str(tmp_path / "cache"))
    finetune_job.write_two(tmp_path)
    config = finetune_job.config(tmp_path, datasets={"cache": True})
    yaml = config.to_yaml()
    trainer = finetune_job.make(config)  # fills the caches
    kept = {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert "What likes p1x0?" in encoded
    encoded.clear()
    found = estimate(config)
    assert set(encoded) <= set(text_encoder.PROBES)  # all embeddings were there
    assert kept and {f: f.read_bytes() for f in (tmp_path / "cache").rglob("*") if f.is_file()} == kept
    assert config.to_yaml() == yaml and not (tmp_path / "runs").exists()
    batches = sum(math.ceil(size / 4) for size in trainer.sizes.values())
    assert found.steps == 3 * batches
    for file in kept:
        file.unlink()
    estimate(config)  # makes them, but keeps nothing
    assert [f for f in (tmp_path / "cache").rglob("*") if f.is_file()] == []


def test_a_part_of_the_texts_is_encoded_for_all(monkeypatch):
    class Clocked(finetune_job.WordEncoder):
        def encode(self, texts, side):
            now[0] += 0.01 * len(texts)
            return super().encode(texts, side)

    now = [0.0]
    monkeypatch.setattr(warm_up.time, "perf_counter", lambda: now[0])
    whole = Clocked()
    some = SomeEncoded(whole)
    texts = [f"What likes p{number}?" for number in range(1000)]
    found = some.encode(texts, "query")
    assert found.shape == (1000, 5) and whole.texts == 65
    assert some.spared == pytest.approx(0.01 * (1000 - 65))
    assert torch.equal(some.encode(texts[:9], "query"), whole.encode(texts[:9], "query"))
    assert encoder_identity(some) == encoder_identity(whole)  # what is kept of it is found


def test_some_encoded_keeps_the_order():
    found, _ = some_encoded(lambda part: torch.tensor([[float(text)] for text in part]), [str(n) for n in range(512)])
    assert (found[:, 0].diff() >= 0).all() and found[0] == 0 and found.unique().numel() > 60


# ---- wrong input ----


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evaluate"], '"evaluate" is no training; estimates are made of lsr, ralt, gfm-pretrain, gfm-finetune'),
        (["lsr", "nowhere.yaml"], 'no configuration file "nowhere.yaml"'),
        (["lsr", "a.yaml", "b.yaml"], "2 configuration files"),
        (["lsr", "train.batchsize=4"], 'did you mean "train.batch_size"?'),
        (["lsr", "data.corpus=nowhere.jsonl"], 'no file or folder "nowhere.jsonl"'),
        (["ralt", "data.corpus=corpus.jsonl"], "there are no train questions in corpus.jsonl"),
        (["lsr", "data.corpus=corpus.jsonl", "data.train=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["gfm-finetune", "datasets.train_names=[nowhere]", "device=cpu"], 'no data set "nowhere"'),
        (["lsr", "resume=nowhere"], 'no run folder "nowhere"'),
    ],
)
def test_wrong_input_is_one_clear_line(own, run_here, arguments, expected):
    status, out, err = run_here(*arguments)
    assert status == 2 and expected in err and out == ""
    assert err.startswith("ragkit: ") and err.count("\n") == 1
    assert "Traceback" in run_here(*arguments, "--traceback")[2]


def test_no_argument_says_how(run_here):
    status, out, _ = run_here()
    assert status == 2 and "python -m ragkit.estimate COMMAND" in out and run_here("--help")[0] == 0


@pytest.mark.parametrize("command", ["lsr", "ralt"])
def test_questions_without_answers_are_the_error_of_the_training(own, run_here, command):
    status, _, err = run_here(command, *own, "data.train=silent.jsonl")
    assert status == 2 and "6 of 6 questions cannot be trained on" in err


def test_what_is_no_training_is_refused(make_system):
    with pytest.raises(TypeError, match="found a EvaluateConfig, expected one of LSRConfig"):
        estimate(EvaluateConfig())
    with pytest.raises(TypeError, match="found a str"):
        estimate("lsr")
    with pytest.raises(ValueError, match="warmup_steps: found 1, expected 2 or more"):
        estimate(LSRConfig(), warmup_steps=1)
    with pytest.raises(ConfigError, match="batch_size"):
        LSRConfig(train={"batch_size": 0})
    silent = LSRTrainer(make_system(), [{**row, "answer": ""} for row in ROWS], LSRConfig(train=train()))
    with pytest.raises(DataError, match="6 of 6 questions cannot be trained on"):
        estimate(silent)


def test_everything_is_put_back_after_an_error(make_system, monkeypatch, tmp_path):
    trainer = lsr(make_system())
    before = state_of(trainer)
    numbers = torch.get_rng_state()
    monkeypatch.setattr(LSRTrainer, "train", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        estimate(trainer)
    assert same(state_of(trainer), before) and torch.equal(torch.get_rng_state(), numbers)
    assert not list((tmp_path / "temporary").iterdir())


# ---- words and JSON ----


def an_estimate(**changes):
    values = {
        "device": "CPU, 2 threads",
        "parameters": 22_713_216,
        "trained": 10_795_392,
        "steps": 60,
        "seconds": {"prepare": 25.4, "training": 130.0, "evaluation": 0.0},
        "memory_mib": 1234.5,
        "weights_mib": 180.25,
        "gradients_mib": 41.2,
        "optimizer_mib": 82.4,
        "checkpoint_mib": 123.4,
        "checkpoints": 2,
        "free_memory_mib": 23000.0,
        "free_disk_mib": 43000.0,
        "warmup_steps": 5,
        "warnings": ("memory: too much",),
    }
    return Estimate(**{**values, **changes})


def test_json_and_back():
    found = an_estimate()
    again = Estimate.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found and str(again) == str(found)
    assert found.total_seconds == pytest.approx(155.4) and found.disk_mib == pytest.approx(246.8)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"steps": None}, "steps is None"),
        ({"memory_mib": "much"}, "memory_mib is 'much'"),
        ({"seconds": 3}, "seconds is 3"),
        ({"seconds": {"training": 3}}, "seconds is {'training': 3}"),
        ({"checkpoints": -1}, "checkpoints is -1"),
        ({"colour": 1}, "'colour' is missing or unknown"),
    ],
)
def test_what_is_no_estimate_is_refused(change, expected):
    with pytest.raises(ValueError, match=expected):
        Estimate.from_dict({**an_estimate().to_dict(), **change})


def test_figures_are_said_with_two_digits_and_about():
    text = str(an_estimate())
    assert "parameters  22,713,216, trained 10,795,392 (48%)" in text
    assert "time        about 2.6 min (prepare 25 s, training 2.2 min)" in text
    assert "memory      about 1.2 GiB of 22 GiB that can be had" in text
    assert "disk        about 250 MiB of 42 GiB free (2 x 120 MiB of checkpoints)" in text
    assert "warning     memory: too much" in text
    html = an_estimate(device="<b>")._repr_html_()
    assert "&lt;b&gt;" in html and "from 5 steps that were really made" in html


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0 s"), (0.0123, "0.012 s"), (9.96, "10 s"), (44.4, "44 s"), (89.9, "90 s"), (90, "1.5 min")]
    + [(3599, "60 min"), (5400, "1.5 h"), (86400 * 12.3, "12 days"), (86400 * 123.4, "120 days")],
)
def test_durations(value, said):
    assert duration(value) == said


@pytest.mark.parametrize(
    ("value", "said"), [(0.6, "0.60 MiB"), (994, "990 MiB"), (996, "0.97 GiB"), (24105, "24 GiB")]
)
def test_sizes(value, said):
    assert size(value) == said


def test_what_does_not_fit_is_said(make_system, monkeypatch):
    trainer = ralt(make_system())
    monkeypatch.setattr(memory, "free_memory", lambda device: 1.0)
    monkeypatch.setattr(memory, "free_disk", lambda folder: 0.001)
    first, second = estimate(trainer).warnings
    assert "does not fit in 1.0 MiB" in first and "train.batch_size" in first
    assert "do not fit in" in second and "train.save_total_limit=1" in second


# ---- the parts ----


def test_a_twin_shares_what_is_not_trained():
    part = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    part[1].weight = part[0].weight  # tied
    moved = [part[1].bias]
    other = twin(part, moved)
    assert other[0].weight is other[1].weight and other[0].weight is not part[0].weight
    assert other[0].weight.data_ptr() == part[0].weight.data_ptr()
    assert other[1].bias.data_ptr() != part[1].bias.data_ptr() and torch.equal(other[1].bias, part[1].bias)
    other[0].weight.requires_grad_(False)
    assert part[0].weight.requires_grad


def test_time_of_many_is_that_of_some(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(warm_up.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(warm_up, "ENOUGH", 1.0)
    calls = []

    def call(part):
        calls.append(len(part))
        now[0] += 0.01 * len(part) + (0.5 if len(calls) == 1 else 0)  # the first call compiles

    assert seconds_each(call, range(1000), some=32) == pytest.approx(0.51 + 9.99)
    assert calls == [1, 32, 32]
    calls.clear()
    assert seconds_each(call, range(5), some=32) == pytest.approx(0.51 + 0.04) and calls == [1, 4]
    assert seconds_each(call, []) == 0 and len(calls) == 2


def test_the_clock_leaves_out_the_first_step_and_waits():
    clock = Clock(4)
    clock.ends = [100.0, 101.0, 102.0, 103.0, 113.0]  # the process had to wait in the last one
    assert clock.step == pytest.approx((1 + 1 + 1 + 3) / 4)


def test_steps_and_times():
    settings = LSRConfig().train
    assert steps_of(20, settings) == 20
    assert steps_of(7, settings.model_copy(update={"num_epochs": 1.5, "gradient_accumulation_steps": 2})) == 6
    assert steps_of(7, settings.model_copy(update={"max_steps": 3})) == 3
    assert [times(60, None), times(60, 50), times(60, 60), times(60, 7)] == [1, 2, 1, 9]


def test_the_peak_is_seen():
    with memory.PeakMemory(torch.device("cpu")) as before:
        pass
    with memory.PeakMemory(torch.device("cpu")) as peak, mmap.mmap(-1, 80 * memory.MIB) as block:
        block.write(bytes(80 * memory.MIB))  # pages of its own: a tensor may lie in what earlier tests have freed
        until(lambda: peak.mib - before.mib > 60, what="memory in sight")
    assert 60 < peak.mib - before.mib < 200


def test_reading_an_estimate_needs_nothing_heavy():
    code = "import sys, ragkit.estimate; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.slow
def test_a_process_of_its_own(own, tmp_path):
    words = [sys.executable, "-m", "ragkit.estimate", "ralt", *own, "train.num_threads=1", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = Estimate.from_dict(json.loads(done.stdout.splitlines()[-1]))
    assert found.steps == 9 and 200 < found.memory_mib < 4000
