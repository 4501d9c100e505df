"""What the README says can be done."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ragkit.commands import COMMANDS
from ragkit.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def example(marker):
    """The README's example in Python that holds `marker`, as it stands."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if marker in block]
    return code


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """run_here(code) -> what it prints, run in this process, which has imported PyTorch already, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def run(code):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One folder for what both examples compute from the small world's graph."""
    return tmp_path_factory.mktemp("cache")


def test_two_commands_end_as_they_should():
    lines = re.findall(r"```bash\n(python3 -m venv .*)\n```", README)
    assert [line.split(" && ")[-1] for line in lines] == [
        ".venv/bin/python -m ragkit quickstart",
        ".venv/bin/python -m pytest -n auto",
    ]


def test_linked_files_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_settings_in_the_shell_examples_are_valid():
    examples = re.findall(r"^python -m ragkit ([\w-]+) +(.*)$", README, flags=re.MULTILINE)
    assert {name for name, _ in examples} >= {
        "lsr",
        "ralt",
        "evaluate",
        "query",
        "gfm-pretrain",
        "gfm-finetune",
        "gfm-evaluate",
    }
    for name, rest in examples:
        load_config(COMMANDS[name][0], None, re.findall(r"""[\w.]+=(?:"[^"]*"|\S+)""", rest))


@pytest.mark.slow
def test_a_graph_foundation_model_on_your_graph(tmp_path, run_here, cache, monkeypatch):
    """The README's example as it stands, on the small world's graph and a checkpoint with random weights."""
    import torch

    import ragkit
    from ragkit.gfm import GFMSettings, GNNRetriever, save_gfm

    (tmp_path / "my_dataset").symlink_to(Path(ragkit.__file__).parent / "small_world" / "data")
    torch.manual_seed(0)
    model = GNNRetriever(GFMSettings(rel_emb_dim=384, input_dim=8, hidden_dims=[8, 8]))
    save_gfm(model, tmp_path / "my_checkpoint")
    monkeypatch.setenv("RAGKIT_CACHE", str(cache))
    titles = json.loads(run_here(example("load_gfm(")).splitlines()[-1].replace("'", '"'))
    graph = ragkit.KnowledgeGraph.load("small_world")
    assert len(titles) == 2 and all(title in graph.documents for title in titles)


@pytest.mark.slow
def test_a_graph_model_is_trained_on_your_questions(tmp_path, run_here, cache, monkeypatch):
    """The README's example as it stands, on the small world with few questions."""
    import shutil

    import ragkit

    folder = tmp_path / "my_graph_data"
    shutil.copytree(Path(ragkit.__file__).parent / "small_world" / "data", folder)
    for split in ("train", "test"):
        path = folder / "processed" / "stage1" / f"{split}.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))[:60]), encoding="utf-8")
    monkeypatch.setenv("RAGKIT_CACHE", str(cache))
    printed = run_here(example("my_graph_data"))
    assert "doc_recall@5" in printed and "RetrievedPassage" in printed and "leonhard euler" in printed
    assert (next((tmp_path / "runs").iterdir()) / "model" / "config.json").is_file()


@pytest.fixture
def own_data(tmp_path):
    """A corpus and questions of a few rows, by the names of the README."""
    towns = {
        "Peru": "Lima",
        "Norway": "Oslo",
        "Japan": "Tokyo",
        "Kenya": "Nairobi",
        "Ghana": "Accra",
        "Cuba": "Havana",
    }
    passages = [{"id": c, "title": c, "text": f"{t} is the capital of {c}."} for c, t in towns.items()]
    rows = [
        {"question": f"What is the capital of {c}?", "answer": t, "supporting_facts": [c]} for c, t in towns.items()
    ]
    for name, lines in (("my_corpus", passages), ("train", rows[:4]), ("test", rows[2:])):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_own_data_in_ten_lines(own_data, tmp_path):
    """In a new process, as the reader's is."""
    code = example("compare(before")
    assert len([line for line in code.splitlines() if line.strip()]) <= 11
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "recall@1" in done.stdout and "em" in done.stdout
    assert (tmp_path / "my_system").is_dir()


@pytest.mark.slow
def test_a_federated_training(own_data, run_here):
    pytest.importorskip("flwr")
    printed = run_here(example("get_federated_task"))
    assert "round 3/3: 4 clients, 12 rows" in printed and "MB sent" in printed


def test_names_of_fedrag_are_there(run_here):
    run_here(example("compat.fedrag"))
