"""What a federated training gave: its history by round and client, and the common weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ragkit.federated.config import FederatedConfig
from ragkit.tables import html_table, text_table

NOT_METRICS = ("round", "phase", "client", "examples", "seconds", "bytes_down", "bytes_up", "error", "steps")


@dataclass(repr=False)
class FederatedResult:
    """What a federated training gave.

    Attributes:
        history: One dictionary for each client's message and each score of the server, in order: round (0: before
            training), phase ("train", "evaluate" or "server"), client (None for the server), and
            - train: examples, train_loss, steps, seconds, bytes_down, bytes_up;
            - evaluate and server: examples and the metrics;
            - error, the reason, where a client failed.
        weights: The common weights after the last round, by name.
        config: The settings.
        run_dir: The folder with the history (`events.jsonl`) and the clients' runs (in a simulation).
        seconds: How long it took.
    """

    history: list[dict[str, Any]]
    weights: dict[str, Tensor]
    config: FederatedConfig
    run_dir: Path
    seconds: float

    @property
    def loss(self) -> float:
        """Mean training loss of the last round, weighted by the clients' rows."""
        return self.curve("train_loss").get(self.config.rounds, math.nan)

    @property
    def clients(self) -> dict[str, int]:
        """Rows that each client trained on."""
        found = {e["client"]: e["examples"] for e in self.history if e["phase"] == "train" and "error" not in e}
        return dict(sorted(found.items()))

    @property
    def metrics(self) -> dict[str, float]:
        """Last scores of the server (`eval_NAME`) and the clients' weighted mean (`client_eval_NAME`)."""
        values = {}
        for phase, prefix in (("evaluate", "client_eval_"), ("server", "eval_")):
            for name in self.names(phase):
                curve = self.curve(name, phase=phase)
                values[prefix + name] = curve[max(curve)]
        return values

    @property
    def failures(self) -> list[dict[str, Any]]:
        """The events of clients that failed."""
        return [event for event in self.history if "error" in event]

    @property
    def bytes_sent(self) -> int:
        """Bytes of all records that travelled, in both directions."""
        return sum(event.get("bytes_down", 0) + event.get("bytes_up", 0) for event in self.history)

    def names(self, phase: str) -> list[str]:
        """The metrics of a phase."""
        keys = (key for event in self.history if event["phase"] == phase for key in event)
        return [key for key in dict.fromkeys(keys) if key not in NOT_METRICS]

    def curve(self, name: str, client: str | int | None = None, phase: str | None = None) -> dict[int, float]:
        """A number by round, for a plot.

        Args:
            name: "train_loss", or a metric such as "loss" or "recall@1".
            client: One client; None: the mean over clients, weighted by their rows.
            phase: "train", "evaluate" (clients) or "server"; None: the server's scores where it has such a metric.

        Returns:
            {round: value}; round 0 is before training.

        Raises:
            KeyError: No such metric or client.
        """
        if phase is None:
            order = ("evaluate", "train") if client is not None else ("server", "evaluate", "train")
            phase = next((kind for kind in order if name in self.names(kind)), None)
        events = [e for e in self.history if e["phase"] == phase and name in e]
        if client is not None:
            events = [event for event in events if event["client"] == str(client)]
        if not events:
            known = sorted({key for kind in ("train", "evaluate", "server") for key in self.names(kind)})
            who = f" of client {client}" if client is not None else ""
            raise KeyError(f"no {name!r}{who} in the history; there are {', '.join(known)}")
        sums: dict[int, list[float]] = {}
        for event in events:
            total = sums.setdefault(event["round"], [0.0, 0.0])
            total[0] += event[name] * event["examples"]
            total[1] += event["examples"]
        return {number: value / weight for number, (value, weight) in sums.items()}

    def steps(self) -> dict[int, float]:
        """Optimizer steps of a client up to the end of each round, on average: the axis of a central run's curve."""
        total, steps = 0.0, {0: 0.0}
        for number, mean in self.curve("steps", phase="train").items():
            total += mean
            steps[number] = total
        return steps

    def _table(self) -> list[list[str]]:
        rounds = sorted({event["round"] for event in self.history})
        columns: list[tuple[str, dict[int, float]]] = []
        for phase, label in (("train", ""), ("evaluate", "clients' "), ("server", "server's ")):
            names = self.names(phase)
            for name in [n for n in ("train_loss", "loss", "recall@1", "recall@5", "mrr", "em", "f1") if n in names]:
                columns.append((label + name.replace("_", " "), self.curve(name, phase=phase)))
        rows = [["round", *(name for name, _ in columns), "clients", "failed", "MB sent"]]
        for number in rounds:
            events = [event for event in self.history if event["round"] == number]
            trained = sum(event["phase"] == "train" and "error" not in event for event in events)
            sent = sum(event.get("bytes_down", 0) + event.get("bytes_up", 0) for event in events)
            values = [f"{curve[number]:.4f}" if number in curve else "" for _, curve in columns]
            failed = sum("error" in event for event in events)
            rows.append([str(number), *values, str(trained), str(failed), f"{sent / 1e6:.2f}"])
        return rows

    def _note(self) -> str:
        tensors = sum(tensor.numel() for tensor in self.weights.values())
        shares = ", ".join(f"client {name}: {rows}" for name, rows in self.clients.items())
        note = (
            f"{self.config.strategy}, {tensors:,} weights travel ({self.bytes_sent / 1e6:.2f} MB in all, both ways); "
            f"rows: {shares}; {self.seconds:.1f} s; {self.run_dir}"
        )
        if self.config.privacy:
            note += f"; {self.config.privacy} differential privacy {self.config.privacy_options}"
        if self.failures:
            first = self.failures[0]
            note += f"; first failure: client {first['client']} in round {first['round']}: {first['error']}"
        return note

    def __repr__(self) -> str:
        return f"{text_table(self._table())}\n{self._note()}"

    def _repr_html_(self) -> str:
        return html_table(self._table(), self._note())
