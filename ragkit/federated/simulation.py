"""Flower in one process: the ServerApp's grid hands each message straight to the ClientApp.

Chosen over Flower's simulation engine, which needs Ray (a 220 MB install and, on two cores, 15 s and 1 GB of memory
before the first message, with a model in each worker): here a round costs its training and nothing else, the model
is in memory once, and every step is deterministic. The apps, messages, records, strategies and modifiers are Flower's
own, the same that a deployment runs.
"""

from __future__ import annotations

import logging
import os
import random
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ragkit.optional import require

RUN_ID = 1


class LocalGrid:
    """Carries messages to a ClientApp in this process, one client after the other.

    It has the methods of `flwr.serverapp.Grid` that strategies use. A client that raises is answered for with Flower's
    error reply, as a SuperNode does.

    Args:
        app: A `flwr.clientapp.ClientApp`.
        num_clients: Nodes 1 to n, with `partition-id` 0 to n - 1 in their config.
        seed: Seed of the noise that clients draw (local differential privacy).
    """

    def __init__(self, app: Any, num_clients: int, seed: int) -> None:
        self.app = app
        records = require("flwr.app", extra="federated")
        self._contexts = {
            number + 1: records.Context(
                run_id=RUN_ID,
                node_id=number + 1,
                node_config={"partition-id": number, "num-partitions": num_clients, "noise-seed": seed},
                state=records.RecordDict(),
                run_config={},
            )
            for number in range(num_clients)
        }

    @property
    def names(self) -> dict[int, str]:
        """What each client calls itself, for those that fail before they have answered."""
        return {node: str(context.node_config["partition-id"]) for node, context in self._contexts.items()}

    def get_node_ids(self) -> list[int]:
        """All of them are there, always."""
        return list(self._contexts)

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        """The replies to the messages; there is no limit of time."""
        records = require("flwr.app", extra="federated")
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())  # given by the SuperLink, where there is one
            with own_random_numbers():
                try:
                    replies.append(self.app(message, self._contexts[message.metadata.dst_node_id]))
                except Exception as error:  # noqa: BLE001 - a client may fail in any way; the round goes on
                    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                    replies.append(records.Message(records.Error(2, reason), reply_to=message))
        return replies


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Random numbers that clients draw or seed leave those of the server as they were.

    Else the server's noise after each round would follow from the seed that the last client's training has set: the
    same noise in every round.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def simulated(seed: int) -> Iterator[None]:
    """Seeds what Flower draws (sampled clients, noise), gives messages a sender, keeps logs and bars out of sight."""
    identity = require("flwr.supercore.task_identity", extra="federated").TaskIdentity
    before = identity._task_id, identity._run_id, identity._node_id
    log = logging.getLogger("flwr")
    level, bars = log.level, os.environ.get("TQDM_DISABLE")
    with own_random_numbers():
        try:
            identity.task_id, identity.run_id, identity.node_id = 1, RUN_ID, RUN_ID
            log.setLevel(logging.WARNING)
            os.environ["TQDM_DISABLE"] = "1"
            random.seed(seed)
            np.random.seed(seed)
            yield
        finally:
            identity._task_id, identity._run_id, identity._node_id = before
            log.setLevel(level)
            if bars is None:
                os.environ.pop("TQDM_DISABLE", None)
            else:
                os.environ["TQDM_DISABLE"] = bars
