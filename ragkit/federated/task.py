"""A tuning task that several owners of data do together."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from ragkit.federated.apps import client_app
from ragkit.federated.config import FederatedConfig
from ragkit.federated.errors import FederatedError
from ragkit.federated.partition import partition_rows, value_of
from ragkit.federated.result import FederatedResult
from ragkit.federated.server import serve
from ragkit.federated.simulation import LocalGrid, simulated
from ragkit.federated.strategies import make_strategy, needed_clients, sampled_clients
from ragkit.runs import Run
from ragkit.tuning.qa_data import QAData
from ragkit.tuning.training import SystemTrainer


class FederatedTask:
    """The training of a retriever (LSR) or a generator (RALT) as a federated one, on Flower.

    Each client trains the weights that it is given on its own rows; what comes back are the tensors that are trained
    (the adapter of a PEFT model, the query encoder), the real loss and the real number of rows. Make it with
    `TrainerManager.get_federated_task()`.

    Args:
        trainer: An `LSRTrainer` or `RALTTrainer`. On a client its data are the client's rows; in a simulation they are
            dealt to the clients; on a server only its system and `eval_data` count.
        config: Settings; None: the defaults.
        folder: Where the run is kept; None: in the trainer's `output_dir`.

    Example:
        >>> task = manager.get_federated_task(rounds=5, local_steps=10)  # doctest: +SKIP
        >>> result = task.simulate(num_clients=4)  # doctest: +SKIP
        >>> result.curve("train_loss")  # doctest: +SKIP
    """

    def __init__(
        self, trainer: SystemTrainer, config: FederatedConfig | None = None, folder: Path | None = None
    ) -> None:
        # Each client would keep other weights than those that it has trained for the round.
        self.trainer = trainer.for_rounds()
        self.config = config or FederatedConfig()
        self.folder = folder

    def __repr__(self) -> str:
        return f"FederatedTask({self.config.strategy}, {self.config.rounds} rounds, {self.trainer!r})"

    def parameters(self) -> dict[str, nn.Parameter]:
        """The tensors that are trained, and that travel, by name."""
        return self.trainer.trained_parameters()

    def with_settings(self, settings: dict[str, Any]) -> FederatedTask:
        """The same task with other settings.

        Raises:
            ConfigError: An unknown name or a value out of its range.
        """
        return FederatedTask(self.trainer, FederatedConfig(**{**self.config.explicit(), **settings}), self.folder)

    def serve(self, grid: Any, run_name: str | None = None) -> FederatedResult:
        """Trains with the clients of a Flower grid; what `server_app` runs.

        Args:
            grid: The `flwr.serverapp.Grid` of a ServerApp.
            run_name: Name of the run folder; None: made of the time.
        """
        run = Run.create(self.config, self.folder or self.trainer.config.output_dir, run_name)
        return serve(self, grid, run, self.config.num_clients or self.config.min_clients)

    def simulate(
        self, num_clients: int | None = None, partition: Any = "iid", eval_partition: Any = "same", **settings: Any
    ) -> FederatedResult:
        """Trains with clients that live in this process, each with its part of the rows.

        The apps, messages and strategies are those of a deployment; see `ragkit.federated.simulation`. The trainer's
        `eval_data` are scored as a whole by the server, and dealt to the clients for their own scores. Afterwards the
        trainer's system holds the common weights.

        Args:
            num_clients: How many; None: the task's `num_clients`, else what `partition` says.
            partition: "iid", a column, or a list; see `partition_rows`.
            eval_partition: The same for `eval_data`; "same": by the same rule (only the server scores them where
                `partition` is a list); None: only the server scores them.
            **settings: Settings that win over those of the task (rounds, strategy, ...).

        Raises:
            FederatedError: A client without rows, an unknown strategy, too many failed clients, ...
        """
        task = self.with_settings(settings)
        trainer, seed = self.trainer, self.trainer.config.train.seed
        columns = trainer.config.data.columns or None
        num_clients = task.config.num_clients if num_clients is None else num_clients
        parts = partition_rows(trainer.data, num_clients, partition, seed, columns)
        if task.config.min_clients > len(parts):
            raise FederatedError(f"min_clients: found {task.config.min_clients}, but there are {len(parts)} clients")
        eval_parts = self._eval_parts(parts, partition, eval_partition, task.config, columns)
        if eval_parts is None:
            task = task.with_settings({"client_evaluation": False})
        strategy = make_strategy(task.config, len(parts))  # what Flower refuses, it refuses before anything is written
        needed = max(needed_clients(strategy), sampled_clients(task.config, len(parts)))
        if needed > len(parts):  # Flower would wait for them for ever
            raise FederatedError(
                f"the strategy waits for {needed} clients, but there are {len(parts)}: give num_clients={needed}, or "
                "smaller numbers in strategy_options (min_train_nodes, min_available_nodes, fraction_train, ...) and "
                "privacy_options (num_sampled_clients)"
            )
        run = Run.create(task.config, self.folder or trainer.config.output_dir)
        clients = [
            FederatedTask(trainer.for_data(part, eval_parts and eval_parts[number]), task.config, run.dir)
            for number, part in enumerate(parts)
        ]
        app = client_app(lambda context: clients[context.node_config["partition-id"]])
        with simulated(seed):
            return serve(task, LocalGrid(app, len(clients), seed), run, len(clients))

    def _eval_parts(
        self, parts: list[QAData], how: Any, eval_how: Any, config: FederatedConfig, columns: Any
    ) -> list[QAData] | None:
        """The evaluation rows of each client; None where only the server scores."""
        data = self.trainer.eval_data
        if data is None or eval_how is None or not config.client_evaluation or not config.evaluate_every:
            return None
        if eval_how != "same":
            return partition_rows(data, len(parts), eval_how, self.trainer.config.train.seed, columns)
        if not isinstance(how, str):
            return None
        if how == "iid":
            if len(data) < len(parts):
                raise FederatedError(
                    f"{len(data)} evaluation rows cannot be dealt to {len(parts)} clients; set eval_partition=None, "
                    "and only the server scores them"
                )
            return partition_rows(data, len(parts), "iid", self.trainer.config.train.seed)
        owner = {value_of(example, how): number for number, part in enumerate(parts) for example in part}
        dealt = Counter(owner.get(value_of(example, how)) for example in data)
        without = [number for number in range(len(parts)) if not dealt[number]]
        if without:
            raise FederatedError(
                f"client {without[0]} has no evaluation rows by the column {how!r}; set eval_partition=None, and only "
                "the server scores them"
            )
        if dealt[None]:
            print(f"{dealt[None]} of {len(data)} evaluation rows belong to no client; the server scores them")
        return [
            QAData([e for e in data if owner.get(value_of(e, how)) == number], data.source)
            for number in range(len(parts))
        ]
