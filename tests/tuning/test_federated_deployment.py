"""A real SuperLink and two SuperNodes on loopback, of which one is killed: what the simulation gives, is given.

One training for all of it, for it is a minute long: Flower starts a process, which imports PyTorch, for each message.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from watching import until

pytest.importorskip("flwr")

from ragkit.federated import apps  # noqa: E402
from ragkit.federated.local import train_round  # noqa: E402

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parents[1] / "helpers" / "federated_task.py"
BIN = Path(sys.executable).parent
# A SuperNode that shows life as often as a SuperLink allows: it is then called gone after 10 to 20 s, not 30 to 60.
# It is the one that is killed; the other one has time on a busy machine.
SHORT_LIVED = """
import sys
from flwr.common import constant
assert "flwr.supercore.heartbeat" not in sys.modules
constant.HEARTBEAT_DEFAULT_INTERVAL = constant.HEARTBEAT_MIN_INTERVAL
from flwr.supernode.cli import flower_supernode
flower_supernode()
"""
SUPERNODES = [[str(BIN / "flower-supernode")], [sys.executable, "-c", SHORT_LIVED]]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # seconds until a process is started, else 1
        }
        self.port = free_port()
        (folder / "flower").mkdir()
        (folder / "flower" / "config.toml").write_text(
            f'[superlink]\ndefault = "loopback"\n[superlink.loopback]\naddress = "127.0.0.1:{self.port}"\n'
            "insecure = true\n"
        )
        self.processes = {}
        options = ["--port", str(self.port), "--disable-runtime-dependency-installation"]
        self.start("link", [str(BIN / "flower-superlink"), "--insecure", *options])
        until(lambda: listening(self.port), 300, "SuperLink")
        for number, node in enumerate(SUPERNODES):
            where = ["--insecure", "--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port())]
            self.start(number, [*node, *where, "--node-config", f"partition-id={number}"])

    def start(self, name, command):
        log = (self.folder / f"{name}.log").open("w")
        self.processes[name] = subprocess.Popen(
            command, env=self.env, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
        )

    def kill(self, name):
        os.killpg(self.processes[name].pid, signal.SIGKILL)
        self.processes[name].wait()

    def flwr(self, *command):
        done = subprocess.run(
            [str(BIN / "flwr"), *command, "--format", "json"],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=300,
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

    from ragkit.rag.generator import Generator

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, max_position_embeddings=256, **sizes)
    Generator(LlamaForCausalLM(config), tokenizer=tokenizer, device="cpu").save(folder / "generator")
    source = SOURCE.read_text().replace("@FOLDER@", str(folder))
    return apps.write_app(folder / "capitals", source, rounds=2, num_clients=2, round_timeout=600.0)


def events_of(folder, run_id):
    lines = (folder / "runs" / f"federated-{run_id}" / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def simulated(app, monkeypatch):
    """The same training in this process; client 1 fails in round 2 here too."""
    spec = importlib.util.spec_from_file_location("capitals_task", app / "capitals" / "task.py")
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)

    def train(trainer, given, orders, folder, name):
        if (name, orders.server_round) == ("1", 2):
            raise RuntimeError("killed")
        return train_round(trainer, given, orders, folder, name)

    monkeypatch.setattr(apps, "train_round", train)
    manager = task.TrainerManager("generator", generator_trainer=task.trainer(task.ROWS))
    return manager.get_federated_task(rounds=2).simulate(partition=task.PARTS, eval_partition=None)


def test_a_deployment_gives_the_weights_of_the_simulation_and_goes_on_without_a_killed_client(
    federation, app, folder, monkeypatch
):
    run_id = federation.submit(app, "rounds=2")
    result = simulated(app, monkeypatch)
    until((folder / "hanging").exists, 300, "second round of client 1")
    federation.kill(1)  # with -9, in the middle of its second round
    killed = time.monotonic()
    final = folder / "runs" / f"federated-{run_id}" / "final.safetensors"
    until(final.exists, 300, "result")
    print(f"gone on without after {time.monotonic() - killed:.0f} s")
    assert until(lambda: federation.finished(run_id), 300, "end") == "finished:completed"

    deployed = load_file(final)
    assert deployed.keys() == result.weights.keys()
    assert all(torch.allclose(deployed[name], tensor, atol=1e-7) for name, tensor in result.weights.items())
    assert any(tensor.abs().max() > 0 for name, tensor in deployed.items() if "lora_B" in name)
    events = events_of(folder, run_id)
    shown = ("round", "phase", "client", "examples")
    assert [[e.get(k) for k in shown] for e in events] == [[e.get(k) for k in shown] for e in result.history]
    trained = [[e for e in history if "train_loss" in e] for history in (events, result.history)]
    assert [e["client"] for e in trained[0]] == ["0", "1", "0"]
    for name in ("train_loss", "steps"):
        assert [e[name] for e in trained[0]] == pytest.approx([e[name] for e in trained[1]], abs=1e-5)
    (failure,) = [event for event in events if "error" in event]
    assert (failure["client"], failure["round"]) == ("1", 2) and "unavailable" in failure["error"].lower()
