"""ClientApp and ServerApp of a federated task, and the folder of a Flower app that holds them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ragkit.federated.config import FederatedConfig
from ragkit.federated.errors import FederatedError
from ragkit.federated.local import Orders, score_round, train_round
from ragkit.federated.strategies import EQUAL, EXAMPLES, privacy_mod
from ragkit.federated.weights import from_record, to_record
from ragkit.files import atomic_write_text
from ragkit.optional import require

if TYPE_CHECKING:
    from ragkit.federated.task import FederatedTask

Build = Callable[[Any], "FederatedTask"]


def client_app(build: Build, mods: Sequence[Any] = ()) -> Any:
    """The Flower ClientApp of a task.

    Args:
        build: (flwr.app.Context) -> `FederatedTask` whose trainer has this client's rows; called for each message.
            `context.node_config` holds what the SuperNode was started with (`--node-config 'data="my_rows.jsonl"'`).
        mods: Flower modifiers of training messages, for example `flwr.clientapp.mod.LocalDpMod(...)`: a client's own
            privacy, whatever the server asks for.

    Returns:
        A `flwr.clientapp.ClientApp`. It keeps its state in `OUTPUT_DIR/federated-RUN/client-NAME`, so a SuperNode
        must go on on the same disk.
    """
    library = require("flwr.clientapp", extra="federated")
    records = require("flwr.app", extra="federated")
    app = library.ClientApp()

    @app.train(mods=[privacy_mod, *mods])
    def train(message: Any, context: Any) -> Any:
        task, name, config = build(context), client_name(context), message.content["config"]
        orders = Orders(
            server_round=int(config["server-round"]),
            rounds=int(config["rounds"]),
            local_steps=int(config["local-steps"]) if "local-steps" in config else None,
            local_epochs=float(config["local-epochs"]),
            reset_optimizer=bool(config["reset-optimizer"]),
            proximal_mu=float(config.get("proximal-mu", 0.0)),
        )
        root = task.folder or Path(task.trainer.config.output_dir) / f"federated-{context.run_id}"
        given = from_record(message.content["arrays"])
        trained, metrics = train_round(task.trainer, given, orders, root / f"client-{name}", name)
        _seed_noise(context, orders.server_round)
        content = records.RecordDict(
            {
                # In the order in which they came: Flower's privacy modifiers compare the lists of names.
                "arrays": to_record({key: trained[key] for key in given}),
                "metrics": records.MetricRecord({**metrics, EQUAL: 1.0}),
                "about": records.ConfigRecord({"client": name}),
            }
        )
        return records.Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Any, context: Any) -> Any:
        task, name = build(context), client_name(context)
        given = from_record(message.content["arrays"])
        generate = bool(message.content["config"]["generate"])
        metrics, examples = score_round(task.trainer, given, generate, f"client {name}")
        content = records.RecordDict(
            {
                "metrics": records.MetricRecord({EXAMPLES: examples, EQUAL: 1.0, **metrics}),
                "about": records.ConfigRecord({"client": name}),
            }
        )
        return records.Message(content, reply_to=message)

    return app


def server_app(build: Build) -> Any:
    """The Flower ServerApp of a task.

    Args:
        build: (flwr.app.Context) -> `FederatedTask` with the initial weights and, as `eval_data`, what the server
            scores on. Keys of the app's run config that are names of `FederatedConfig` (with - or _) set it:
            `flwr run . --run-config "rounds=10 local-steps=20"`; other keys are for `build` to read.

    Returns:
        A `flwr.serverapp.ServerApp`. It writes `OUTPUT_DIR/federated-RUN`, with `final.safetensors`.
    """
    app = require("flwr.serverapp", extra="federated").ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        task = build(context)
        given = {key.replace("-", "_"): value for key, value in context.run_config.items()}
        known = {key: value for key, value in given.items() if key in FederatedConfig.model_fields}
        result = task.with_settings(known).serve(grid, f"federated-{context.run_id}")
        print(result)

    return app


def client_name(context: Any) -> str:
    """What a client calls itself: its partition-id, else its node's number."""
    return str(context.node_config.get("partition-id", context.node_id))


def _seed_noise(context: Any, server_round: int) -> None:
    """Training has seeded NumPy; the noise of local privacy must not follow from that seed.

    A simulation gives each client and round a seed of its own; a deployed client takes the system's entropy.
    """
    seed = context.node_config.get("noise-seed")
    entropy = None if seed is None else [int(seed), int(context.node_id), server_round]
    np.random.seed(np.random.SeedSequence(entropy).generate_state(4))


PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0.0"
description = "Federated tuning of a RAG system with ragkit"
license = "Apache-2.0"
dependencies = ["ragkit[federated]"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "{publisher}"

[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"

[tool.flwr.app.config]
{settings}
"""

SIDE = '''\
"""The {side}'s side; {what}."""

from __future__ import annotations

from ragkit.federated.apps import {side}_app

from {package}.task import build

app = {side}_app(build)
'''

TASK = '''\
"""What is trained together: the same system everywhere, and on each client its own rows."""

from __future__ import annotations

from ragkit import LSRConfig, LSRTrainer, RAGSystem, TrainerManager


def build(context):
    """The task as this node sees it; clients start with: --node-config 'partition-id=0 data="my_rows.jsonl"'"""
    system = RAGSystem.load("system")  # what RAGSystem.save wrote, the same on all nodes
    rows = context.node_config.get("data", "server_rows.jsonl")  # the server trains on none: any readable file
    trainer = LSRTrainer(system, rows, LSRConfig(), eval_data=rows)
    return TrainerManager("retriever", retriever_trainer=trainer).get_federated_task()
'''


def write_app(folder: str | Path, task: str | None = None, publisher: str = "me", **settings: Any) -> Path:
    """Writes the folder of a Flower app: `flwr run FOLDER` then trains on the SuperNodes of a SuperLink.

    Args:
        folder: New folder; its name becomes the app's.
        task: Python source of the module that defines `build(context) -> FederatedTask`, for both sides; None: an
            example to fill in.
        publisher: Name of who publishes the app, as Flower asks for.
        **settings: Those of `FederatedConfig`, for the app's run config; what is written there can be overridden with
            `flwr run FOLDER --run-config "rounds=10"`, so rounds, num_clients and min_clients always are.

    Returns:
        The folder: pyproject.toml and a package with task.py, client_app.py and server_app.py.

    Raises:
        FederatedError: The folder holds files already, its name cannot be a package's, or a setting is a mapping,
            which a run config cannot hold (`build` can set it).
        ConfigError: An unknown setting or a value out of its range.
    """
    folder = Path(folder)
    package = folder.name.replace("-", "_").lower()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", package):
        raise FederatedError(f"{folder.name!r} cannot be an app's name: use letters, digits, - and _")
    if folder.exists() and any(folder.iterdir()):
        raise FederatedError(f"{folder} holds files already; choose a new folder")
    config = FederatedConfig(**settings)
    values = {
        "rounds": config.rounds,
        "num_clients": config.num_clients or max(2, config.min_clients),
        "min_clients": config.min_clients,
    }
    values |= config.explicit()
    for key, value in values.items():
        if not isinstance(value, (str, int, float)):
            raise FederatedError(f"{key}: a run config cannot hold {value!r}; let build(context) set it")
    (folder / package).mkdir(parents=True, exist_ok=True)
    pyproject = PYPROJECT.format(
        name=package.replace("_", "-"),
        package=package,
        publisher=publisher,
        settings="\n".join(f"{key.replace('_', '-')} = {json.dumps(value)}" for key, value in values.items()),
    )
    atomic_write_text(folder / "pyproject.toml", pyproject)
    atomic_write_text(folder / package / "__init__.py", '"""A Flower app."""\n')
    atomic_write_text(folder / package / "task.py", TASK if task is None else task)
    for side, what in (("client", "Flower runs it on every SuperNode"), ("server", "Flower runs it on the SuperLink")):
        atomic_write_text(folder / package / f"{side}_app.py", SIDE.format(side=side, what=what, package=package))
    return folder
