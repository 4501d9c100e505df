"""A real SuperLink and two SuperNodes on loopback: the same weights as the simulation, and a client that is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr")
pytestmark = pytest.mark.slow

SOURCE = Path(__file__).with_name("federated_task.py")
BIN = Path(sys.executable).parent


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition, seconds, what):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"no {what} in {seconds} s"
        time.sleep(0.25)
    return found


def listening(port):
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Federation:
    """A SuperLink and SuperNodes, each in a process group of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.env = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.port = free_port()
        (folder / "flower").mkdir()
        (folder / "flower" / "config.toml").write_text(
            f'[superlink]\ndefault = "loopback"\n[superlink.loopback]\naddress = "127.0.0.1:{self.port}"\n'
            "insecure = true\n"
        )
        self.processes = {}
        options = ["--port", str(self.port), "--disable-runtime-dependency-installation"]
        self.start("link", ["flower-superlink", "--insecure", *options])
        until(lambda: listening(self.port), 60, "SuperLink")
        for number in (0, 1):
            self.start(number, ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}",
                                "--port", str(free_port()), "--node-config", f"partition-id={number}"])  # fmt: skip

    def start(self, name, command):
        log = (self.folder / f"{name}.log").open("w")
        command = [str(BIN / command[0]), *command[1:]]
        self.processes[name] = subprocess.Popen(
            command, env=self.env, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
        )

    def kill(self, name):
        os.killpg(self.processes[name].pid, signal.SIGKILL)
        self.processes[name].wait()

    def flwr(self, *command):
        done = subprocess.run(
            [str(BIN / "flwr"), *command, "--format", "json"], env=self.env, capture_output=True, text=True, timeout=60
        )
        return json.loads(done.stdout)

    def submit(self, app, settings):
        answer = self.flwr("run", str(app), "loopback", "--run-config", settings)
        assert answer["success"], answer
        return answer["run-id"]

    def finished(self, run_id):
        (run,) = [run for run in self.flwr("list", "loopback")["runs"] if run["run-id"] == run_id]
        return run["status"] if run["status"].startswith("finished") else None

    def stop(self):
        for name, process in self.processes.items():
            if process.poll() is None:
                self.kill(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("federation")


@pytest.fixture(scope="module")
def federation(folder):
    federation = Federation(folder)
    yield federation
    federation.stop()


@pytest.fixture(scope="module")
def app(folder, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    from ragkit.federated.apps import write_app
    from ragkit.rag.generator import Generator

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, max_position_embeddings=256, **sizes)
    Generator(LlamaForCausalLM(config), tokenizer=tokenizer, device="cpu").save(folder / "generator")
    source = SOURCE.read_text().replace("@FOLDER@", str(folder))
    return write_app(folder / "capitals", source, rounds=2, num_clients=2, round_timeout=600.0)


def events_of(folder, run_id):
    lines = (folder / "runs" / f"federated-{run_id}" / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_deployment_gives_the_weights_of_the_simulation(federation, app, folder):
    run_id = federation.submit(app, "rounds=2")
    until(lambda: (folder / "runs" / f"federated-{run_id}" / "final.safetensors").exists(), 120, "result")
    assert until(lambda: federation.finished(run_id), 30, "end") == "finished:completed"
    deployed = load_file(folder / "runs" / f"federated-{run_id}" / "final.safetensors")

    spec = importlib.util.spec_from_file_location("capitals_task", app / "capitals" / "task.py")
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)
    manager = task.TrainerManager("generator", generator_trainer=task.trainer(task.ROWS))
    result = manager.get_federated_task(rounds=2).simulate(partition=task.PARTS, eval_partition=None)
    assert deployed.keys() == result.weights.keys()
    assert all(torch.allclose(deployed[name], tensor, atol=1e-7) for name, tensor in result.weights.items())
    assert any(tensor.abs().max() > 0 for name, tensor in deployed.items() if "lora_B" in name)
    shown = ("round", "phase", "client", "examples")
    assert [[e[k] for k in shown] for e in events_of(folder, run_id)] == [
        [e[k] for k in shown] for e in result.history
    ]
    losses = [e["train_loss"] for e in events_of(folder, run_id) if e["phase"] == "train"]
    assert losses == pytest.approx([e["train_loss"] for e in result.history if e["phase"] == "train"], abs=1e-5)


def test_a_killed_supernode_is_gone_on_without(federation, app, folder):
    """Flower calls a node gone that missed its heartbeats (30 to 60 s); the round then goes on at once."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    (folder / "hang").touch()
    run_id = federation.submit(app, "rounds=2")
    until((folder / "hanging").exists, 180, "second round of client 1")
    federation.kill(1)
    killed = time.monotonic()
    until(lambda: (folder / "runs" / f"federated-{run_id}" / "final.safetensors").exists(), 180, "result")
    print(f"gone on without after {time.monotonic() - killed:.0f} s")
    events = events_of(folder, run_id)
    failures = [event for event in events if "error" in event]
    assert [(event["client"], event["round"]) for event in failures] == [("1", 2)]
    assert "unavailable" in failures[0]["error"].lower()
    assert [e["client"] for e in events if e["phase"] == "train" and "error" not in e] == ["0", "1", "0"]
