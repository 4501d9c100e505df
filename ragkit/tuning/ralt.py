"""Retrieval-augmented LM training (RALT): the generator learns to answer from the passages it will be given."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from torch import nn

from ragkit.config import ConfigError, RALTConfig
from ragkit.engine import RunTrainer, TrainResult, run_training, training_arguments
from ragkit.notes import note
from ragkit.prompts import PromptError
from ragkit.rag.ensemble import passage_weights
from ragkit.rag.scoring import check_pairs
from ragkit.runs import Run
from ragkit.tuning.fused_loss import packing_works, training_loss
from ragkit.tuning.lora import adapter_parameters, add_adapter, is_peft_model
from ragkit.tuning.qa_data import DataError, QAData, QAExample
from ragkit.tuning.ralt_rows import Collator, RALTRow, add_supporting, check_rows, exchange_passages
from ragkit.tuning.scoring import has_no_token
from ragkit.tuning.training import SystemTrainer, training_only


@contextmanager
def _without_cache(config: Any) -> Iterator[None]:
    """Within the block the model keeps no keys and values; the configuration is given back as it was.

    The Trainer turns them off as well, but only in the outermost part of a configuration, where some (Gemma 3) have no
    such setting; and packed rows are told apart only by a model that keeps none.
    """
    parts = list({id(part): part for part in (config, config.get_text_config())}.values())
    before = [vars(part).get("use_cache", None) for part in parts]
    had = ["use_cache" in vars(part) for part in parts]
    try:
        for part in parts:
            part.use_cache = False
        yield
    finally:
        for part, value, there in zip(parts, before, had, strict=True):
            if there:
                part.use_cache = value
            else:
                vars(part).pop("use_cache", None)


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
    `system.generator` holds the trained model: with method="lora" or "dora" a PEFT model whose adapter is active. The
    loss is computed without the prompt's logits (`fused_loss`, see `ragkit.tuning.fused_loss.training_loss`).

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
        if self.config.passage_weights == "retrieval" and self.config.context == "joined":
            raise ConfigError(
                'passage_weights: found "retrieval", but with context="joined" one instance holds all passages; use '
                'context="each"'
            )
        self.passages = passages
        self._rows: list[RALTRow] | None = None

    def rows(self) -> list[RALTRow]:
        """The training instances, to look at before training: `print(trainer.rows()[0])`."""
        if self._rows is None:
            rows, self.left_out = self._make_rows(self.data)
            self.report_left_out(len(rows))
            self._rows = rows
        return self._rows

    def _eval_rows(self) -> list[RALTRow] | None:
        """The instances whose loss is logged; says which of the questions make none."""
        if self.eval_data is None:
            return None
        rows, left_out = self._make_rows(self.eval_data)
        if left_out:
            message = (
                f"{len(left_out)} of {len(self.eval_data)} evaluation questions have no loss (first: "
                f"{left_out[0][0]}: {left_out[0][1]})"
            )
            if not rows:
                raise DataError(message)
            note(message)
        return rows

    def _make_rows(self, data: QAData) -> tuple[list[RALTRow], list[tuple[str, str]]]:
        config, generator = self.config, self.system.generator
        problems = [(example, self._problem(example)) for example in data]
        left_out = [(example.id, problem) for example, problem in problems if problem]
        examples = [example for example, problem in problems if not problem]
        found = self.system.batch_retrieve([example.question for example in examples], top_k=config.top_k)
        if self.passages == "random":
            found = exchange_passages(examples, found, config.train.seed)
        elif config.add_gold:
            found = add_supporting(self.system.retriever.store, examples, found, config.train.seed)
        rows = []
        for example, passages in zip(examples, found, strict=True):
            if not passages:
                left_out.append((example.id, "no passage retrieved"))
                continue
            response = generator.encode_response(example.answer, eos=True, template=self.system.template)
            contexts = (
                [[passage] for passage in passages] if config.context == "each" else [self._mixed(example, passages)]
            )
            weights = [1.0] * len(contexts)
            if config.passage_weights == "retrieval":
                weights = [len(passages) * share for share in passage_weights(passages, config.weights_gamma)]
            try:
                rows += [self._row(example, *each, response) for each in zip(contexts, weights, strict=True)]
            except PromptError as error:  # the response leaves no room even for a prompt with empty passages
                left_out.append((example.id, f"answer of {len(response)} tokens: {error}"))
        return rows, left_out

    def _problem(self, example: QAExample) -> str:
        """Why there is nothing to learn from an answer; "" if there is."""
        if not example.answer:
            return "no answer"
        # With the end of sequence alone, the model would learn to say nothing.
        empty = has_no_token(self.system.generator, example)
        return f"the answer {example.answer!r} has no token" if empty else ""

    def _mixed(self, example: QAExample, passages: Sequence[Any]) -> list[Any]:
        """The passages of a joined instance as retrieved, or with `shuffle_passages` in a seeded random order."""
        passages = list(passages)
        if self.config.shuffle_passages:
            random.Random(f"order:{self.config.train.seed}:{example.id}").shuffle(passages)
        return passages

    def _row(self, example: QAExample, passages: Sequence[Any], weight: float, response: Sequence[int]) -> RALTRow:
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
            weight,
        )

    def train(self, resume: bool = False) -> TrainResult:
        """Trains the generator in place.

        Args:
            resume: Go on with `run` (or with the run called `config.name`) from its last checkpoint.

        Returns:
            Loss (nats per response token), history, steps and the run's folder.

        Raises:
            DataError: No usable question, or (resume) other training instances than those the run began with.
            ConfigError: `lora_targets` names no layer of the model, method="full" or "dora" on a model with an adapter
                of another kind, or packing with a model that cannot.
            ScoringError: Tokens that the model has no row for.
            NonFiniteLossError: The loss became NaN or infinite.
        """
        config, generator = self.config, self.system.generator
        resumed = self.open_run(resume) if resume else None  # first: from here on it can be stopped
        rows = self.rows()
        eval_rows = self._eval_rows()
        self._check_model([*rows, *(eval_rows or [])])
        model = self._prepared_model()
        run = resumed or self.open_run(resume)  # a new folder only once all that was asked for can be done
        check_rows(run, rows, resume, [config.passage_weights, config.weights_gamma])
        collator = Collator(generator.pad_id, self._packed_length(rows) if config.packing else None)
        weighted = config.passage_weights != "none"
        retrievers = self._retriever_modules()
        trained = self._trained_parameters(model)
        try:
            with (
                _without_cache(generator.core.config),
                training_only(trained, [model, *retrievers]),
                training_loss(model, config.fused_loss, weighted),
            ):
                trainer = RunTrainer(
                    model,
                    training_arguments(config.train, run, device=trained[0].device.type),
                    run,
                    train_dataset=rows,
                    eval_dataset=eval_rows,
                    data_collator=collator,
                    callbacks=self.callbacks,
                )
                try:
                    result = run_training(trainer, run, resume=resume)
                finally:
                    # Takes mixed precision's wrapper off `forward`: inference keeps the model's own number format.
                    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        finally:
            if config.train.gradient_checkpointing:  # transformers >= 5.2x calls it activation checkpointing
                new, old = "activation_checkpointing_disable", "gradient_checkpointing_disable"
                getattr(generator.core, new if hasattr(generator.core, new) else old)()
            model.eval()
        return result

    def _prepared_model(self) -> nn.Module:
        """The generator's model, with the adapter that is to be trained."""
        generator = self.system.generator
        if self.config.method != "full":
            generator.model = add_adapter(generator.model, self.config)
        elif is_peft_model(generator.model):
            raise ConfigError(
                'method: found "full", but the generator carries an adapter; use method="lora" to train it on, '
                "or merge it first: generator.model = generator.model.merge_and_unload()"
            )
        return generator.model

    def _check_model(self, rows: Sequence[RALTRow]) -> None:
        """Refuses tokens that the model has no row for, and packing where instances would see each other."""
        core = self.system.generator.core
        names = [f"question {row.id!r}: prompt and response" for row in rows]
        check_pairs(core, [r.prompt_ids for r in rows], [r.response_ids for r in rows], names, None)
        if self.config.packing and not packing_works(core):
            raise ConfigError(
                f"packing: in {type(core).__name__} with attention {core.config._attn_implementation!r} instances of "
                "one row would see each other; set packing to false"
            )

    def _packed_length(self, rows: Sequence[RALTRow]) -> int:
        """Tokens of a packed row: what `max_length` or the model's context allow, at most four long instances."""
        limits = [self.config.max_length, self.system.generator.max_length, 4 * max(map(len, rows))]
        return min(limit for limit in limits if limit is not None)

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
