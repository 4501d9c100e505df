"""FedRAG's federated task on ragkit's."""

from __future__ import annotations

from typing import Any, NoReturn

from ragkit.federated.errors import FederatedError
from ragkit.federated.task import FederatedTask


class HuggingFaceFLTask(FederatedTask):
    """A `ragkit.federated` task. FedRAG's `server` and `client` are objects of Flower's first API, which Flower has
    given up; their errors say what to use."""

    @classmethod
    def from_trainer_and_tester(cls, *given: Any, **named: Any) -> NoReturn:
        """Not here: an error that says what to use."""
        raise FederatedError(
            "HuggingFaceFLTask.from_trainer_and_tester(...) wraps decorated functions; here a task is made from the "
            "trainers themselves: HuggingFaceRAGTrainerManager(mode, retriever_trainer, generator_trainer)"
            ".get_federated_task(rounds=3).simulate(num_clients=2)"
        )

    def server(self, *given: Any, **named: Any) -> NoReturn:
        """Not here: an error that says what to use."""
        raise FederatedError(f"fl_task.server(...) {_INSTEAD.format(side='server')}")

    def client(self, *given: Any, **named: Any) -> NoReturn:
        """Not here: an error that says what to use."""
        raise FederatedError(f"fl_task.client(...) {_INSTEAD.format(side='client')}")


_INSTEAD = (
    "belongs to an API that Flower has removed. In this process: fl_task.simulate(num_clients=2). On several "
    "machines: ragkit.federated.apps.{side}_app(build), where build(context) gives this task; write_app(folder) of "
    "the same module writes all files for `flwr run folder`, and each client trains the model it is given on its own "
    "rows"
)
