"""The settings of a federated training."""

from __future__ import annotations

from typing import Any, Literal

from ragkit.settings import Config, setting

Privacy = Literal["server-fixed", "server-adaptive", "client-fixed", "client-adaptive", "local"]


class FederatedConfig(Config):
    """Trains one part of a RAG system on rows that stay with several clients, with Flower."""

    rounds: int = setting(3, "How often the clients' weights are brought together.", unit="rounds", ge=1)
    local_epochs: float = setting(
        1.0, "How often a client goes through its own rows in one round.", unit="epochs", gt=0
    )
    local_steps: int | None = setting(
        None, "Optimizer steps of a client in one round; overrides local_epochs.", unit="steps", ge=1
    )
    optimizer: Literal["keep", "reset"] = setting(
        "keep",
        "keep: a client's optimizer goes on where it was, as if there were no rounds; reset: its moments start anew "
        "in each round (classic FedAvg). Schedule and data order go on over the rounds either way.",
    )
    strategy: str = setting(
        "FedAvg", "Flower strategy that brings the weights together: FedAvg, FedProx, FedAdam, FedMedian, Krum, ..."
    )
    strategy_options: dict[str, Any] = setting({}, "Parameters of the strategy, for example {proximal_mu: 0.1}.")
    min_clients: int = setting(
        1,
        "A round goes on without clients that fail, but with fewer than this many it ends the run with an error.",
        unit="clients",
        ge=1,
    )
    num_clients: int | None = setting(
        None,
        "Clients that a deployed server waits for before its first round; null: min_clients.",
        unit="clients",
        ge=1,
    )
    privacy: Privacy | None = setting(
        None,
        "Differential privacy by Flower: noise of the server on clipped updates (clipped there or by the clients, at "
        "a fixed or adaptive norm), or noise of each client (local); null: none.",
    )
    privacy_options: dict[str, Any] = setting(
        {}, "Parameters of the privacy wrapper, for example {noise_multiplier: 1.0, clipping_norm: 0.5}."
    )
    evaluate_every: int = setting(
        1, "Rounds from one evaluation to the next; the last round is always scored; 0: none is.", unit="rounds", ge=0
    )
    client_evaluation: bool = setting(True, "Clients score the common weights on evaluation rows of their own.")
    generate: bool = setting(False, "Evaluations also generate answers and score them (em, f1), which takes longer.")
    round_timeout: float = setting(
        3600.0, "A deployed server takes a client as failed that has not answered by then.", unit="seconds", gt=0
    )
    start_timeout: float = setting(
        300.0, "How long a deployed server waits for clients to connect before it gives up.", unit="seconds", gt=0
    )

    def is_due(self, server_round: int) -> bool:
        """Whether this round is followed by an evaluation; round 0 stands for the weights before training."""
        if self.evaluate_every == 0:
            return False
        return server_round % self.evaluate_every == 0 or server_round == self.rounds
