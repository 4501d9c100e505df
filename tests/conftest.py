"""Shared by all tests: no network, a tiny random LM, and the real MiniLM encoder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core already: more threads would only be in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# The same examples in every run, and no verdict on the speed of a busy machine. To search anew:
# pytest --hypothesis-profile=default
settings.register_profile("ragkit", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ragkit")


# What takes longest comes first, so that the processes end together.
LONGEST = (
    "test_notebooks.py",
    "test_commands.py",
    "test_proof.py",
    "test_triton_offline.py",
    "test_jobs.py",
    "test_ipywidgets7.py",
    "test_run_panel_jobs.py",
    "test_federated_deployment.py",
    "test_readme.py",
    "test_lab.py",
    "test_triton_interpreter.py",
    "test_processes.py",
    "test_linear_logprob_triton.py",
    "test_engine.py",
    "test_docs.py",
    "test_lsr_loss_triton.py",
    "test_federated.py",
    "test_quickstart.py",
    "test_gfm_commands.py",
    "test_execute.py",
)


def pytest_addoption(parser):
    parser.addoption("--everything", action="store_true", help="also what CI leaves out so that it ends in time")


def pytest_collection_modifyitems(config, items):
    """Leaves the tests marked `long` out, unless `--everything` asks for them."""
    if not config.getoption("everything"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes long; pytest --everything runs it"))
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`pytest -n auto`: a file stays in one process, with its fixtures; each notebook is a piece of work of its own.

    Not by `--dist loadgroup`, which groups nothing with pytest 9.2 and pytest-xdist 3.8: every test was alone, and
    the fixtures of a file were made in each process.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return nodeid if file.endswith("test_notebooks.py") else file

    config.option.loadscopereorder = False  # the order is ours, not that of the number of tests
    return ByFile(config, log)


TEXTS = [
    "Passage: Lima is the capital of Peru.\nQuestion: What is the capital of Peru?\nAnswer: Lima",
    "Answer the question from the sources.\n[1] Paris is the capital of France.\n[2] Quito is the capital of Ecuador.",
    "The river Nile flows through Egypt and Sudan. Mount Kenya is a mountain in Africa, the second after Kilimanjaro.",
]


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer with <pad>, <s> and </s>, trained here. Tests that change it must copy it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def tiny_lm(tokenizer):
    """A random two-layer Llama, the same in every test; larger weights than usual, so that its answers differ."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.4,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def minilm():
    """The real encoder. Tests that train it must copy it."""
    from ragkit.rag.encoder import Encoder

    return Encoder("default", device="cpu")


@pytest.fixture
def hold(tmp_path_factory):
    """Holds a training of another process at a step, or before it makes its run folder."""
    from holding import Hold

    return Hold(tmp_path_factory.mktemp("hold"))


@pytest.fixture
def held(hold, monkeypatch):
    """`hold` for all processes that the test starts; held.at(place): they wait there until `held.let_go()`."""
    for name, value in hold.environment.items():
        monkeypatch.setenv(name, value)
    return hold


@pytest.fixture
def kill_when():
    """kill_when(arguments, reached, environment, seconds): runs a Python job, and kills it as soon as `reached()`."""

    def kill(arguments, reached, environment=None, seconds=300):
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + seconds
        try:
            while not reached():
                if process.poll() is not None:
                    pytest.fail(f"the job ended by itself: {process.stdout.read()}")
                assert time.monotonic() < deadline, "the job never got there"
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()

    return kill
