"""What one client does in a round: train the weights it is given on its own rows, or score them.

A client keeps a run folder over the rounds. Each round resumes it with the given weights in the place of its own, for
as many steps as a round has; optimizer, schedule, data order and random numbers go on where they were. So one client
that trains for r rounds does exactly what a training without rounds does. The folder is all a client needs to go on
with: Flower starts a new process for every message.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ragkit.federated.errors import FederatedError
from ragkit.federated.weights import load_weights
from ragkit.files import atomic_write_json, exclusive
from ragkit.runs import Run, checkpoint_step
from ragkit.tuning.training import SystemTrainer

FOLDER_FILE = "federated.json"


@dataclass(frozen=True)
class Orders:
    """What the server asks of a client in one round.

    Attributes:
        server_round: The round, from 1.
        rounds: Rounds of the whole training; the learning rate's schedule spans them all.
        local_steps: Optimizer steps in the round; None: `local_epochs`.
        local_epochs: How often the client goes through its rows in the round.
        reset_optimizer: Starts the optimizer's moments anew.
        proximal_mu: FedProx's mu; 0: no proximal term.
    """

    server_round: int
    rounds: int
    local_steps: int | None = None
    local_epochs: float = 1.0
    reset_optimizer: bool = False
    proximal_mu: float = 0.0


class RoundCallback(TrainerCallback):
    """One round within a longer training: given weights at its start, a checkpoint and an end after its last step.

    FedProx (Li et al. 2020, arXiv:1812.06127, eq. 2) minimises  F(w) + mu/2 ||w - w_t||^2  with w_t the given weights.
    The gradient of the second term, mu (w - w_t), is added to that of the loss once a step, after clipping: what is
    clipped is the data's gradient, and the pull towards the common weights is not weakened by it.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], given: Mapping[str, Tensor], last_step: int, orders: Orders
    ) -> None:
        self.parameters, self.given, self.last_step, self.orders = parameters, given, last_step, orders
        self._anchors: dict[str, Tensor] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Puts the given weights in; by now the Trainer has loaded its checkpoint."""
        load_weights(self.parameters, self.given, "the client")
        if self.orders.reset_optimizer:
            kwargs["optimizer"].state.clear()
        if self.orders.proximal_mu:
            if args.fp16 and not args.max_grad_norm:
                raise FederatedError("FedProx with train.precision=fp16 needs train.max_grad_norm above 0, or bf16")
            self._anchors = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """FedProx's term; the gradients are clipped (and with fp16 unscaled) by now."""
        with torch.no_grad():
            for name, anchor in self._anchors.items():
                parameter = self.parameters[name]
                pull = self.orders.proximal_mu * (parameter - anchor)
                parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)

    def on_step_end(self, args, state, control, **kwargs):
        """Ends the round with a checkpoint."""
        if state.global_step >= self.last_step:
            control.should_save = True
            control.should_training_stop = True
        return control


def train_round(
    trainer: SystemTrainer, given: Mapping[str, Tensor], orders: Orders, folder: Path, name: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Trains the given weights on the client's rows for one round.

    Args:
        trainer: The client's trainer, with its own rows.
        given: The common weights by name.
        orders: What the server asks.
        folder: The client's run folder; made in its first round.
        name: The client, for messages.

    Returns:
        (trained weights by name, metrics): num-examples (rows that the loss is a mean over), train_loss (mean of the
        round's steps), steps, seconds.

    Raises:
        FederatedError: No rows, weights of another model, more rounds than were planned, or a training that was
            stopped within the round.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder.parent / f"{folder.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # A round that the server gave up waiting for may still be running here, in another process.
        with exclusive(handle):
            return _train_round(trainer, given, orders, folder, name)
    finally:
        os.close(handle)


def _train_round(
    trainer: SystemTrainer, given: Mapping[str, Tensor], orders: Orders, folder: Path, name: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    began = time.monotonic()
    parameters = trainer.trained_parameters()
    use_weights(trainer, parameters, given, name)
    plan = _plan(trainer, orders, folder, name)
    resume = (folder / "config.yaml").is_file()
    run = Run(folder)
    checkpoint = run.last_checkpoint() if resume else None
    first = 0 if checkpoint is None else checkpoint_step(checkpoint)
    last = first + plan["steps"]
    if last > plan["total"]:
        raise FederatedError(
            f"client {name}: round {orders.server_round} would end at step {last}, but {orders.rounds} rounds of "
            f"{plan['steps']} steps were planned in {folder}; start a new run"
        )
    local = copy.copy(trainer)
    settings = {"max_steps": plan["total"], "save_steps": None, "eval_steps": None, "save_total_limit": 1}
    train = trainer.config.train.model_copy(update=settings)
    local.config = trainer.config.model_copy(update={"train": train, "name": None})
    local.eval_data = None  # scored by the server's order only
    local.callbacks = [*trainer.callbacks, RoundCallback(parameters, given, last, orders)]
    local.run = run if resume else Run.create(local.config, folder.parent, folder.name)
    local._made_run = False
    if not resume:
        atomic_write_json(folder / FOLDER_FILE, plan)
    result = local.train(resume=resume)
    if result.steps != last:
        raise FederatedError(
            f"client {name}: round {orders.server_round} was stopped at step {result.steps}, before its last ({last})"
        )
    trained = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    metrics = {
        "num-examples": int(plan["rows"]),
        "train_loss": mean_loss(local.run, first, last),
        "steps": int(last - first),
        "seconds": time.monotonic() - began,
    }
    return trained, metrics


def _plan(trainer: SystemTrainer, orders: Orders, folder: Path, name: str) -> dict[str, int]:
    """Rows, steps of a round and steps in all: counted in the first round, read back later."""
    path = folder / FOLDER_FILE
    if path.is_file():
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            return {key: int(plan[key]) for key in ("rows", "steps", "total")}
        except (ValueError, KeyError, TypeError) as error:
            raise FederatedError(f"{path}: cannot be read ({error!r}); start a new run") from error
    rows = len(trainer.rows())
    if not rows:
        raise FederatedError(f"client {name} has no rows that can be trained on")
    train = trainer.config.train
    updates = math.ceil(math.ceil(rows / train.batch_size) / train.gradient_accumulation_steps)  # in an epoch
    steps = orders.local_steps or max(1, math.ceil(orders.local_epochs * updates))
    return {"rows": rows, "steps": steps, "total": steps * orders.rounds}


def mean_loss(run: Run, first: int, last: int) -> float:
    """Mean training loss of the steps after `first` up to `last`; an event holds the mean since the one before."""
    total, before = 0.0, first
    for event in run.events():
        if event.get("loss") is not None and first < event["step"] <= last:
            total += event["loss"] * (event["step"] - before)
            before = event["step"]
    return total / (before - first) if before > first else math.nan


def use_weights(
    trainer: SystemTrainer, parameters: Mapping[str, nn.Parameter], given: Mapping[str, Tensor], name: str
) -> None:
    """Puts weights into the trainer's system; an index that no longer fits its passage encoder is made anew."""
    changed = load_weights(parameters, given, f"client {name}" if name != "server" else "the server")
    if trainer.trains != "retriever" or trainer.config.train_part != "both":
        return
    retriever = trainer.system.retriever
    if changed:
        retriever.mark_stale()
    if retriever.stale:
        retriever.refresh()


def score_round(
    trainer: SystemTrainer, given: Mapping[str, Tensor], generate: bool, name: str
) -> tuple[dict[str, float], int]:
    """Scores given weights on the trainer's evaluation rows.

    Args:
        trainer: With `eval_data`.
        given: Weights by name.
        generate: Generates answers and scores them too.
        name: Who scores, for messages.

    Returns:
        (metrics, number of questions). A retriever's are those of retrieval (recall@k, mrr, ...), a generator's is
        `loss`: the mean negative log-likelihood of the response's tokens, in nats; with `generate` em and f1 too.

    Raises:
        FederatedError: No evaluation rows, none that can be scored, or weights of another model.
    """
    if trainer.eval_data is None or not len(trainer.eval_data):
        raise FederatedError(f"{name} has no evaluation rows; give eval_data, or set client_evaluation=False")
    use_weights(trainer, trainer.trained_parameters(), given, name)
    metrics: dict[str, float] = {}
    if trainer.trains == "generator":
        metrics["loss"] = response_loss(trainer)
    if trainer.trains == "retriever" or generate:
        found = trainer.evaluate(bootstrap=100, generate=generate, retrieve=trainer.trains == "retriever")
        metrics |= {key: value.mean for key, value in found.metrics.items() if value.n}
    if not metrics:
        raise FederatedError(
            f"{name}: none of the {len(trainer.eval_data)} evaluation rows can be scored: a retriever needs rows "
            "with supporting passages, or generate=True and answers"
        )
    return metrics, len(trainer.eval_data)


def response_loss(trainer: SystemTrainer) -> float:
    """Mean negative log-likelihood of a response token on the evaluation rows, in nats."""
    rows = trainer.for_data(trainer.eval_data).rows()
    responses = [row.response_ids for row in rows]
    total = trainer.system.generator.sequence_logprob([row.prompt_ids for row in rows], responses).double().sum()
    return -float(total) / sum(map(len, responses))
