"""The server's side: one Flower strategy over a watched grid, in this process or on a SuperLink."""

from __future__ import annotations

import copy
import logging
import re
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from ragkit.federated.errors import FederatedError
from ragkit.federated.local import score_round, use_weights
from ragkit.federated.result import FederatedResult
from ragkit.federated.strategies import make_strategy, needed_clients, privacy_settings
from ragkit.federated.weights import from_record, size_in_bytes, to_record
from ragkit.optional import require
from ragkit.runs import Run

if TYPE_CHECKING:
    from ragkit.federated.task import FederatedTask

logger = logging.getLogger("ragkit")
POLL_SECONDS = 1.0


class WatchedGrid:
    """A Flower grid that writes down what travels and who fails, and ends a training that lost too many clients.

    It has the methods of `flwr.serverapp.Grid` that strategies use, and hands them on.

    Args:
        grid: The grid that carries the messages.
        task: Its settings are read.
        run: Takes the history as events.
        needed: Clients that the strategy waits for before each round.
    """

    def __init__(self, grid: Any, task: FederatedTask, run: Run, needed: int) -> None:
        self.grid, self.config, self.run = grid, task.config, run
        self.needed = needed
        self.history: list[dict[str, Any]] = []
        # node -> the client's name for itself, once it has answered
        self._names: dict[int, str] = dict(getattr(grid, "names", {}))
        self._short_since: float | None = None

    def log(self, event: dict[str, Any]) -> None:
        """Adds to the history and to the run's events."""
        self.history.append(event)
        self.run.log({"step": event["round"], "total": self.config.rounds, **event})

    def wait(self, num_clients: int) -> None:
        """Returns when so many clients are connected.

        Raises:
            FederatedError: `start_timeout` is over.
        """
        end = time.monotonic() + self.config.start_timeout
        while (found := len(list(self.grid.get_node_ids()))) < num_clients:
            if time.monotonic() > end:
                raise FederatedError(
                    f"{found} of {num_clients} clients are connected after {self.config.start_timeout:g} s "
                    "(start_timeout): start the others' flower-supernode, or set num_clients"
                )
            time.sleep(POLL_SECONDS)

    def get_node_ids(self) -> list[int]:
        """The clients that are connected; a strategy asks again and again while there are too few.

        Raises:
            FederatedError: There have been fewer than needed for `start_timeout` seconds.
        """
        found = sorted(self.grid.get_node_ids())
        if len(found) >= self.needed:
            self._short_since = None
        elif self._short_since is None:
            self._short_since = time.monotonic()
        elif time.monotonic() - self._short_since > self.config.start_timeout:
            raise FederatedError(
                f"{len(found)} clients are there, at least {self.needed} are needed (min_clients, strategy_options or "
                f"privacy_options); no more came in {self.config.start_timeout:g} s (start_timeout)"
            )
        return found

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        """Sends one round's messages and returns the replies, in the order of the clients' names.

        Raises:
            FederatedError: Fewer than min_clients trained.
        """
        messages = list(messages)
        if not messages:
            return []
        kind = messages[0].metadata.message_type
        number = int(messages[0].content["config"]["server-round"])
        if kind == "evaluate" and not self.config.is_due(number):
            return []
        sent = {message.metadata.dst_node_id: size_in_bytes(message.content) for message in messages}
        replies = list(self.grid.send_and_receive(messages, timeout=timeout))
        # By the message that is answered: for a client that is gone the SuperLink answers, in its own name.
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        nodes = [asked.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id) for reply in replies]
        failed: dict[int, str] = {}
        for node, reply in zip(nodes, replies, strict=True):
            if reply.has_error():
                failed[node] = _reason(reply.error)
            else:
                self._names[node] = str(reply.content["about"]["client"])
        self._check_names([node for node in nodes if node not in failed])
        records = require("flwr.app", extra="federated")
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in nodes:
                # An error as any other: with privacy, Flower leaves out a round only where it sees one.
                failed[node] = f"no answer in {timeout or 0:g} s (round_timeout)"
                replies.append(records.Message(records.Error(0, failed[node]), reply_to=message))
                nodes.append(node)
        answers = sorted(zip(nodes, replies, strict=True), key=lambda answer: self._order(answer[0]))
        for node, reply in answers:
            if not reply.has_error():
                self.log(self._event(reply, node, kind, number, sent[node]))
        for node in sorted(failed, key=self._order):
            event = {"round": number, "phase": kind, "client": self._name(node), "error": failed[node]}
            self.log({**event, "bytes_down": sent.get(node, 0)})
            logger.warning("round %d: client %s failed to %s: %s", number, self._name(node), kind, failed[node])
        if kind == "train" and len(sent) - len(failed) < self.config.min_clients:
            reasons = "; ".join(f"client {self._name(node)}: {reason}" for node, reason in failed.items())
            raise FederatedError(
                f"round {number}: {len(sent) - len(failed)} of {len(sent)} clients trained, at least "
                f"{self.config.min_clients} (min_clients) are needed. {reasons}"
            )
        # Flower would have all scores by the same names; the history keeps them as they are.
        return [reply for _, reply in answers] if kind == "train" else []

    def _check_names(self, nodes: list[int]) -> None:
        seen: dict[str, int] = {}
        for node in nodes:
            other = seen.setdefault(self._names[node], node)
            if other != node:
                raise FederatedError(
                    f"the nodes {other} and {node} both call themselves client {self._names[node]}, and would share "
                    "its folder and count as one: start each flower-supernode with another partition-id"
                )

    def _event(self, reply: Any, node: int, kind: str, number: int, down: int) -> dict[str, Any]:
        values = dict(reply.content["metrics"])
        event = {"round": number, "phase": kind, "client": self._name(node)}
        event["examples"] = int(values.pop("num-examples"))
        values.pop("equal-weight", None)
        return {**event, **values, "bytes_down": down, "bytes_up": size_in_bytes(reply.content)}

    def _name(self, node: int) -> str:
        return self._names.get(node, f"at node {node}")

    def _order(self, node: int) -> tuple[int, str]:
        """Numbers in their order, then the rest: a sum of floats depends on its order, so it must not be chance."""
        name = self._name(node)
        return (int(name), "") if name.isdigit() else (2**62, name)


def serve(task: FederatedTask, grid: Any, run: Run, num_clients: int) -> FederatedResult:
    """Trains over a grid: the strategy's rounds, the server's own scores, the common weights into the task's system.

    Args:
        task: Its trainer holds the initial weights and, as `eval_data`, what the server scores on.
        grid: A `flwr.serverapp.Grid`, or a `LocalGrid`.
        run: Takes history, metrics and `final.safetensors`.
        num_clients: Clients to wait for before the first round.

    Raises:
        FederatedError: Too few clients, or settings that Flower refuses. The system then holds the common weights of
            the last whole round.
    """
    app = require("flwr.app", extra="federated")
    began, config, trainer = time.monotonic(), task.config, task.trainer
    strategy = make_strategy(config, num_clients)
    watched = WatchedGrid(grid, task, run, max(config.min_clients, needed_clients(strategy)))
    common: dict[str, Tensor] = {name: p.detach().clone() for name, p in task.parameters().items()}

    def after_round(number: int, arrays: Any) -> Any:
        nonlocal common
        common = from_record(arrays)
        if trainer.eval_data is not None and config.is_due(number):
            metrics, examples = score_round(trainer, common, config.generate, "server")
            watched.log({"round": number, "phase": "server", "client": None, "examples": examples, **metrics})
        _say(watched.history, number, config.rounds)
        return None

    orders: dict[str, Any] = {"rounds": config.rounds, "local-epochs": float(config.local_epochs)}
    if config.local_steps is not None:
        orders["local-steps"] = config.local_steps
    orders["reset-optimizer"] = config.optimizer == "reset"
    try:
        watched.wait(num_clients)
        strategy.start(
            watched,
            to_record(common),
            num_rounds=config.rounds,
            timeout=config.round_timeout,
            train_config=app.ConfigRecord({**orders, **privacy_settings(config)}),
            evaluate_config=app.ConfigRecord({"generate": config.generate}),
            evaluate_fn=after_round,
        )
    finally:
        use_weights(trainer, task.parameters(), common, "server")
    save_file({name: tensor.contiguous() for name, tensor in common.items()}, run.dir / "final.safetensors")
    result = FederatedResult(copy.deepcopy(watched.history), common, config, run.dir, time.monotonic() - began)
    run.write_metrics({"loss": result.loss, **result.metrics, "bytes_sent": result.bytes_sent})
    return result


def _say(history: list[dict[str, Any]], number: int, rounds: int) -> None:
    """One line a round."""
    events = [event for event in history if event["round"] == number]
    parts = []
    trained = [event for event in events if event["phase"] == "train" and "error" not in event]
    if trained:
        rows = sum(event["examples"] for event in trained)
        loss = sum(event["train_loss"] * event["examples"] for event in trained) / rows
        parts.append(f"{len(trained)} clients, {rows} rows, train loss {loss:.4f}")
    failed = [event for event in events if "error" in event]
    if failed:
        parts.append(f"{len(failed)} failed")
    for event in events:
        if event["phase"] == "server":
            shown = [name for name in ("loss", "recall@1", "recall@5", "em", "f1") if name in event]
            parts.append("server: " + ", ".join(f"{name} {event[name]:.4f}" for name in shown))
    if parts:
        print(f"round {number}/{rounds}: {'; '.join(parts)}")


def _reason(error: Any) -> str:
    """What Flower reports of a failed client, in one line; an exception's comes as "<class 'x.Y'>:<'message'>"."""
    text = " ".join(str(error.reason or f"error {error.code}").split())
    raised = re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>:<'(.*)'>", text)
    return (f"{raised[1]}: {raised[2]}" if raised else text)[:500]
