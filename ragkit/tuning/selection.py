"""Which weights LSR ends with: those that do best on training questions that were held out, the initial ones included.

A teacher that cannot answer is noise, and a retriever that follows it gets worse: with the shipped LM as the teacher,
25 steps on 2WikiMultihopQA took recall@5 from .699 to .479. A person who tunes must not end with less than they had.
What that costs where the teacher is good: a tenth of the questions, on the small world (400 questions, 50 steps, three
seeds) recall@1 .758 in place of .763, from .647 (`kernels/benchmarks/tuning_quality.csv`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from transformers import TrainerCallback

from ragkit.base_config import TrainConfig
from ragkit.best import Kept, best_of, give_to_all, keep_if_better
from ragkit.evaluation import retrieval_values
from ragkit.files import atomic_file
from ragkit.holding_out import hold_out
from ragkit.lsr_config import LSRConfig
from ragkit.notes import note
from ragkit.processes import is_first, world_size
from ragkit.runs import Run, RunError
from ragkit.tuning.candidates import collate
from ragkit.tuning.lsr_objective import lsr_objective
from ragkit.tuning.qa_data import QAExample
from ragkit.tuning.teacher import LSRRow

WEIGHTS = "best.safetensors"
HELD_OUT = "held_out"  # the scored rows of the held-out questions, where they are needed
AUTO_SHARE, FEWEST = 0.1, 20
# In a training, where train.eval_steps does not say how often; with "both" each one encodes all passages anew.
EVALUATIONS = {"query": 8, "both": 3}
DEPTH = 10  # passages looked at


def hold_out_examples(data: Sequence[QAExample], config: LSRConfig) -> tuple[list[QAExample], list[QAExample]]:
    """Parts the training questions in those to train on and those to choose the weights by.

    Questions that share a supporting passage, or their text, stay on one side.

    Args:
        data: The training questions.
        config: keep, valid_share and train.seed are read. A share of null is a tenth of the questions, where that is
            at least 20: fewer would choose by chance.

    Returns:
        (to train on, held out), both in the order of `data`; nothing is held out with keep="last".
    """
    share = AUTO_SHARE if config.valid_share is None else config.valid_share
    few = config.valid_share is None and round(share * len(data)) < FEWEST
    if config.keep == "last" or not share or few:
        return list(data), []
    keys = [[("text", e.question), *(("passage", name) for name in e.supporting)] for e in data]
    kept, held = hold_out(keys, share, config.train.seed)
    if config.valid_share is None and len(held) < FEWEST:  # nearly all questions share their passages
        return list(data), []
    return [data[place] for place in kept], [data[place] for place in held]


class Selection(TrainerCallback):
    """Scores the held-out questions before the first step and at each evaluation, and keeps the best weights.

    The metric is nDCG@10 of the questions with supporting passages: of one supporting passage it is a function of its
    rank, as MRR is, and of several it sees each (MRR would not see that the second one was lost). Where less than half
    of the questions have any, it is the LSR loss itself, against the teacher's scores: that shows over-fitting, but
    not a teacher that is noise.

    The weights are in the run's folder (`best.safetensors`, with `best.json`), written atomically, so a run that is
    stopped or killed and then resumed ends with the same ones as an unbroken run.

    Args:
        system: The RAG system that is trained.
        examples: The held-out questions.
        config: Settings.
        run: The run.
        scale: What the retriever's scores are multiplied by.
        rows: Scored rows of the examples; needed (and read) where the metric is the loss.
    """

    def __init__(
        self,
        system: Any,
        examples: Sequence[QAExample],
        config: LSRConfig,
        run: Run,
        scale: float = 1.0,
        rows: Sequence[LSRRow] = (),
    ) -> None:
        self.system, self.config, self.run, self.scale = system, config, run, scale
        self.by_passages = judged_by_passages(examples)
        self.examples = [e for e in examples if e.supporting] if self.by_passages else list(examples)
        self.rows = list(rows)
        self.metric = f"held_out/ndcg@{DEPTH}" if self.by_passages else "held_out/loss"

    @property
    def questions(self) -> int:
        """How many questions the metric is a mean over."""
        return len(self.examples) if self.by_passages else len(self.rows)

    def engine_settings(self, train: TrainConfig, rows: int) -> TrainConfig:
        """The settings with the steps at which the held-out questions are scored.

        Args:
            train: Settings; their eval_steps win.
            rows: Rows that are trained on.
        """
        if train.eval_steps is not None:
            return train
        batches = math.ceil(rows / (train.batch_size * world_size()))
        total = train.max_steps or math.ceil(
            max(1, math.ceil(batches / train.gradient_accumulation_steps)) * train.num_epochs
        )
        return train.model_copy(update={"eval_steps": max(1, math.ceil(total / EVALUATIONS[self.config.train_part]))})

    def measure(self) -> dict[str, float]:
        """The metrics of the held-out questions, with the retriever as it is; its index must fit."""
        if not self.by_passages:
            return {self.metric: self._loss()}
        found = self.system.retriever.retrieve([example.question for example in self.examples], DEPTH)
        names = [[str(passage.id) for passage in row] for row in found]
        values = retrieval_values(names, [set(example.supporting) for example in self.examples], (1, DEPTH))
        return {f"held_out/{name}": float(values[name].mean()) for name in (f"ndcg@{DEPTH}", "recall@1", "mrr")}

    @torch.no_grad()
    def _loss(self) -> float:
        """The mean of the LSR loss over the rows, each with its own passages only."""
        config, total = self.config, 0.0
        for start in range(0, len(self.rows), config.train.batch_size):
            part = self.rows[start : start + config.train.batch_size]
            batch = collate(part)
            scores = self.system.retriever.score(batch["questions"], batch["passage_ids"], part=config.train_part)
            scores = scores * self.scale if self.scale != 1.0 else scores
            values, mask = batch["lm_scores"].to(scores.device), batch["mask"].to(scores.device)
            total += len(part) * float(lsr_objective(scores, values, mask, None, config))
        return total / len(self.rows)

    # ---- while training ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Scores the initial weights; a resumed run has done so."""
        if state.global_step == 0:
            if self.system.retriever.stale:
                self.system.retriever.refresh()
            values = {f"eval_{name}": value for name, value in self.measure().items()}
            if state.is_world_process_zero:
                self.run.log({"step": 0, "total": state.max_steps, **values})
            self.on_evaluate(args, state, control, metrics=values, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Keeps the weights if they are better than all before."""
        value = (metrics or {}).get(f"eval_{self.metric}")
        if value is None or not state.is_world_process_zero:
            return
        model = kwargs["model"]
        keep_if_better(
            self.run, self.metric, value, state.global_step, lambda: self._save(model), not self.by_passages
        )

    def _save(self, model: nn.Module) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        with atomic_file(self.path) as file:
            file.write(save(tensors))

    # ---- afterwards ----

    @property
    def path(self) -> Path:
        """The file of the weights."""
        return self.run.dir / WEIGHTS

    def take(self, trainer: Any, parameters: Sequence[nn.Parameter], steps: int) -> Kept | None:
        """Puts the kept weights into the engine's model; all processes take part.

        Args:
            trainer: The engine.
            parameters: What was trained.
            steps: Steps that were made.

        Returns:
            What was kept; None on a process that is not the first.

        Raises:
            RunError: The kept weights cannot be read.
        """
        kept = None
        if is_first():
            best = best_of(self.run)
            if best is None or best["metric"] != self.metric:
                raise RunError(f"{self.run.dir}: no weights were kept by {self.metric}; start a new run")
            try:
                tensors = load_file(self.path)
            except (OSError, SafetensorError) as error:
                raise RunError(f"{self.path}: the kept weights cannot be read ({error}); start a new run") from error
            trainer.model.load_state_dict(tensors)
            first = [e[f"eval_{self.metric}"] for e in self.run.events() if e.get(f"eval_{self.metric}") is not None]
            kept = Kept(best["step"], steps, self.metric, best["value"], first[0], self.questions)
            note(f"kept the encoder of {kept}")
            self.run.write_metrics({"kept_step": kept.step, f"kept_{self.metric}": kept.value})
        give_to_all(parameters)
        return kept


def judged_by_passages(examples: Sequence[QAExample]) -> bool:
    """Whether at least half of the questions have supporting passages to look for."""
    return 2 * sum(bool(example.supporting) for example in examples) >= len(examples)
