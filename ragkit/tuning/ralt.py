"""Retrieval-augmented LM training (RALT): the generator learns to answer from the passages it will be given."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ragkit.config import ConfigError, RALTConfig
from ragkit.engine import RunTrainer, TrainResult, run_training, training_arguments
from ragkit.files import atomic_write_json
from ragkit.processes import is_first
from ragkit.prompts import PromptError
from ragkit.runs import Run
from ragkit.tuning.lora import adapter_parameters, add_adapter, is_peft_model
from ragkit.tuning.qa_data import DataError, QAData, QAExample
from ragkit.tuning.training import SystemTrainer, training_only

IGNORED = -100  # the label that the cross-entropy of transformers leaves out


@dataclass(frozen=True)
class RALTRow:
    """One training instance: a prompt with its passages, and the response whose tokens make the loss.

    Attributes:
        id: The example's id (several rows share it with context="each").
        question: The question.
        passages: The passages in the prompt, best first.
        prompt_ids: Tokens of the prompt; no loss on them.
        response_ids: Tokens of the response and the end-of-sequence token.
        prompt: The prompt as the model sees it, decoded from its tokens.
        response: The response, decoded from its tokens.
    """

    id: str
    question: str
    passages: tuple[Any, ...]
    prompt_ids: tuple[int, ...] = field(repr=False)
    response_ids: tuple[int, ...] = field(repr=False)
    prompt: str
    response: str

    def __repr__(self) -> str:
        counts = f"{len(self.prompt_ids)} prompt + {len(self.response_ids)} response tokens"
        return f"RALTRow({self.id}, {counts})\n{self.prompt}▶{self.response}"


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right to the longest, with labels on the response only."""

    pad_id: int

    def __call__(self, rows: Sequence[RALTRow]) -> dict[str, Any]:
        """B rows -> input_ids, attention_mask and labels, each int64 [B, T], and the ids for error messages."""
        width = max(len(row.prompt_ids) + len(row.response_ids) for row in rows)
        shape = (len(rows), width)
        input_ids = torch.full(shape, self.pad_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        for number, row in enumerate(rows):
            start, end = len(row.prompt_ids), len(row.prompt_ids) + len(row.response_ids)
            input_ids[number, :end] = torch.tensor(row.prompt_ids + row.response_ids)
            attention_mask[number, :end] = 1
            labels[number, start:end] = input_ids[number, start:end]
        return {
            "ids": [row.id for row in rows],
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
        }


class RALTTrainer(SystemTrainer):
    """Trains the generator of a RAG system on questions with the passages that the retriever finds for them.

    For each training question q with response y and its K retrieved passages d:

        minimise  −Σ_t log p_LM(y_t | q, d, y_<t)      over the tokens of the response and the end of sequence only

    (RA-DIT's LM fine-tuning, Lin et al. 2023, arXiv:2310.01352, section 2.2). With context="each" every passage makes
    an instance of its own, as in the paper (also those that do not hold the answer: the model learns not to be led
    astray); with "joined" one instance holds all of them, as inference does. Best first, as retrieved, the model also
    learns how far to trust that order; `shuffle_passages` takes this from it. The prompt is that of inference
    (`system.template`); where it is too long the passages are cut, never the question or the response.

    Retrieval and tokenisation happen once. The retriever requires no gradient meanwhile. Afterwards
    `system.generator` holds the trained model: with method="lora" a PEFT model whose adapter is active.

    Args:
        system: The RAG system; its generator is trained in place.
        train_data: Questions with responses, in any form that `load_qa` reads.
        config: Settings; None: the defaults.
        eval_data: Questions for `evaluate()`; their loss is logged every `train.eval_steps`.
        run: Folder to write to; None: a new one in `config.output_dir`.
        passages: "retrieved"; or "random", the control that gives every question as many passages that were retrieved
            for other questions (seeded): whatever still improves was not learnt from reading.

    Example:
        >>> trainer = RALTTrainer(system, [{"query": [...], "response": [...]}])  # doctest: +SKIP
        >>> print(trainer.rows()[0]); trainer.train().loss  # doctest: +SKIP
    """

    trains: ClassVar[Literal["retriever", "generator"]] = "generator"

    def __init__(
        self,
        system: Any,
        train_data: Any,
        config: RALTConfig | None = None,
        eval_data: Any = None,
        run: Run | None = None,
        passages: Literal["retrieved", "random"] = "retrieved",
    ) -> None:
        super().__init__(system, train_data, config or RALTConfig(), eval_data, run)
        if passages not in ("retrieved", "random"):
            raise ConfigError(f'passages: found {passages!r}, expected "retrieved" or "random"')
        self.passages = passages
        self._rows: list[RALTRow] | None = None

    def rows(self) -> list[RALTRow]:
        """The training instances, to look at before training: `print(trainer.rows()[0])`."""
        if self._rows is None:
            self._rows, self.left_out = self._make_rows(self.data)
            self.report_left_out(len(self._rows))
        return self._rows

    def _make_rows(self, data: QAData) -> tuple[list[RALTRow], list[tuple[str, str]]]:
        config, generator = self.config, self.system.generator
        left_out = [(example.id, "no answer") for example in data if not example.answer]
        examples = [example for example in data if example.answer]
        found = self.system.batch_retrieve([example.question for example in examples], top_k=config.top_k)
        if self.passages == "random":
            found = exchange_passages(examples, found, config.train.seed)
        elif config.add_gold:
            found = add_supporting(self.system.retriever.store, examples, found, config.train.seed)
        rows = []
        for example, passages in zip(examples, found, strict=True):
            response = generator.encode_response(example.answer, eos=True, template=self.system.template)
            contexts = (
                [[passage] for passage in passages] if config.context == "each" else [self._mixed(example, passages)]
            )
            try:
                rows += [self._row(example, context, response) for context in contexts]
            except PromptError as error:  # the response leaves no room even for a prompt with empty passages
                left_out.append((example.id, f"answer of {len(response)} tokens: {error}"))
        return rows, left_out

    def _mixed(self, example: QAExample, passages: Sequence[Any]) -> list[Any]:
        """The passages of a joined instance as retrieved, or with `shuffle_passages` in a seeded random order."""
        passages = list(passages)
        if self.config.shuffle_passages:
            random.Random(f"order:{self.config.train.seed}:{example.id}").shuffle(passages)
        return passages

    def _row(self, example: QAExample, passages: Sequence[Any], response: Sequence[int]) -> RALTRow:
        generator = self.system.generator
        if self.config.max_length is not None:
            # A shallow copy with a shorter limit: the generator itself keeps the one for inference.
            room, limit = max(0, self.config.max_length - len(response)), generator.max_prompt_tokens
            generator = copy.copy(generator)
            generator.max_prompt_tokens = room if limit is None else min(limit, room)
        prompt = generator.encode_prompt(self.system.template, example.question, passages, reserve=len(response))
        decode = generator.tokenizer.decode
        return RALTRow(
            example.id,
            example.question,
            tuple(passages),
            tuple(prompt),
            tuple(response),
            decode(prompt),
            decode(response),
        )

    def train(self, resume: bool = False) -> TrainResult:
        """Trains the generator in place.

        Args:
            resume: Go on with `run` (or with the run called `config.name`) from its last checkpoint.

        Returns:
            Loss (nats per response token), history, steps and the run's folder.

        Raises:
            DataError: No usable question, or (resume) other training instances than those the run began with.
            ConfigError: `lora_targets` names no layer of the model, or method="full" on a model with an adapter.
            NonFiniteLossError: The loss became NaN or infinite.
        """
        config, generator = self.config, self.system.generator
        rows = self.rows()
        eval_rows = self._make_rows(self.eval_data)[0] if self.eval_data is not None else None
        run = self.open_run(resume)
        check_rows(run, rows, resume)
        model = self._prepared_model()
        retrievers = self._retriever_modules()
        trained = self._trained_parameters(model)
        use_cache = generator.core.config.use_cache
        try:
            with training_only(trained, [model, *retrievers]):
                trainer = RunTrainer(
                    model,
                    training_arguments(config.train, run, device=trained[0].device.type),
                    run,
                    train_dataset=rows,
                    eval_dataset=eval_rows,
                    data_collator=Collator(generator.pad_id),
                    callbacks=self.callbacks,
                )
                result = run_training(trainer, run, resume=resume)
                # Takes mixed precision's wrapper off `forward`: inference keeps the model's own number format.
                trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        finally:
            if config.train.gradient_checkpointing:  # transformers >= 5.2x calls it activation checkpointing
                new, old = "activation_checkpointing_disable", "gradient_checkpointing_disable"
                getattr(generator.core, new if hasattr(generator.core, new) else old)()
            generator.core.config.use_cache = use_cache  # the Trainer turns it off
            model.eval()
        return result

    def _prepared_model(self) -> nn.Module:
        """The generator's model, with the adapter that is to be trained."""
        generator = self.system.generator
        if self.config.method == "lora":
            generator.model = add_adapter(generator.model, self.config)
        elif is_peft_model(generator.model):
            raise ConfigError(
                'method: found "full", but the generator carries an adapter; use method="lora" to train it on, '
                "or merge it first: generator.model = generator.model.merge_and_unload()"
            )
        return generator.model

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The tensors that `train` moves, by name: the adapter's, or all of the model; adds the adapter if need be."""
        model = self._prepared_model()
        trained = {id(parameter) for parameter in self._trained_parameters(model)}
        return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in trained}

    def _keep_rows_of(self, ids: set[str]) -> None:
        if self._rows is not None:
            self._rows = [row for row in self._rows if row.id in ids] or None

    def _trained_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        if self.config.method == "full":
            return [parameter for parameter in model.parameters() if parameter.is_floating_point()]
        return adapter_parameters(model)

    def _retriever_modules(self) -> list[nn.Module]:
        modules = getattr(self.system.retriever, "trainable_modules", None)
        return list(modules("both").values()) if modules is not None else []


def check_rows(run: Run, rows: Sequence[RALTRow], resume: bool) -> None:
    """Keeps a digest of the training instances in the run's folder; a resumed run must have the same ones.

    Retrieval and tokenisation are done again for a resumed run, and its data order means nothing for other instances.

    Raises:
        DataError: They differ, or the digest cannot be read.
    """
    path = run.dir / "ralt_rows.json"
    now: dict[str, Any] = {"rows": len(rows)}
    for part in ("ids", "prompt_ids", "response_ids"):
        values = [getattr(row, "id" if part == "ids" else part) for row in rows]
        now[part] = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    if not resume or not path.exists():
        if is_first() and (resume or not run.events()):  # a run that has events is not begun again
            atomic_write_json(path, now)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        kept = {part: before[part] for part in now}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error!r}); start a new run") from error
    reasons = {
        "ids": "the questions, or how many passages are retrieved for each",
        "prompt_ids": "the prompts: another corpus, retriever, template or order of the passages",
        "response_ids": "the answers",
    }
    differs = [reason for part, reason in reasons.items() if kept[part] != now[part]]
    if differs:
        raise DataError(
            f"{run.dir} cannot be resumed: it began with {kept['rows']} training instances, now there are "
            f"{now['rows']}, and they differ in {'; '.join(differs)}. Resume with the corpus, questions and retriever "
            "of the beginning, or start a new run"
        )


def exchange_passages(examples: Sequence[QAExample], found: Sequence[Sequence[Any]], seed: int) -> list[list[Any]]:
    """The control: as many passages as were retrieved, but drawn from those retrieved for other questions.

    Raises:
        DataError: Too few questions for any question to get other passages than its own.
    """
    pool = {passage.id: passage for passages in found for passage in passages}
    exchanged = []
    for example, passages in zip(examples, found, strict=True):
        own = {passage.id for passage in passages} | set(example.supporting)
        others = [passage for identity, passage in pool.items() if identity not in own]
        if len(others) < len(passages):
            raise DataError(
                f'passages="random": only {len(others)} passages were retrieved for other questions than '
                f"{example.id!r}, {len(passages)} are needed"
            )
        exchanged.append(random.Random(f"{seed}:{example.id}").sample(others, len(passages)))
    return exchanged


def add_supporting(
    store: Any, examples: Sequence[QAExample], found: Sequence[Sequence[Any]], seed: int
) -> list[list[Any]]:
    """Puts a supporting passage in the place of a retrieved one, where retrieval found none of them.

    The place is drawn (seeded): always the last one would teach the model to read the last passage.
    """
    completed = []
    for example, retrieved in zip(examples, found, strict=True):
        passages = list(retrieved)
        supporting = [identity for identity in example.supporting if identity in store]
        if passages and supporting and not {passage.id for passage in passages} & set(example.supporting):
            place = random.Random(f"{seed}:{example.id}").randrange(len(passages))
            passages[place] = store.get(supporting[:1])[0]
        completed.append(passages)
    return completed
