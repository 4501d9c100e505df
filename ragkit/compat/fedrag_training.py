"""FedRAG's trainers and their manager on ragkit's."""

from __future__ import annotations

from enum import Enum
from typing import Any, TypeVar

from ragkit.compat.fedrag_arguments import convert_arguments
from ragkit.compat.fedrag_federated import HuggingFaceFLTask
from ragkit.compat.fedrag_names import refuse_unknown
from ragkit.compat.fedrag_system import core_of
from ragkit.config import ConfigError, LSRConfig, RALTConfig, TrainConfig
from ragkit.evaluation import EvaluationResult
from ragkit.tuning.lora import is_peft_model
from ragkit.tuning.lsr import LSRTrainer
from ragkit.tuning.manager import TrainerManager
from ragkit.tuning.qa_data import DataError, QAData
from ragkit.tuning.ralt import RALTTrainer

C = TypeVar("C", LSRConfig, RALTConfig)
KNOWN = ["rag_system", "train_dataset", "training_arguments", "eval_dataset", "config"]
_IN_ARGUMENTS = {
    name: f"it goes into training_arguments=TrainingArguments({name}=...)"
    for name in ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "max_steps", "output_dir", "seed")
}
_IN_LSR = {
    **_IN_ARGUMENTS,
    "temperature": "there are two: config=LSRConfig(gamma=...) of the retriever, LSRConfig(beta=...) of the LM",
    **{name: f"it goes into config=LSRConfig({name}=...)" for name in ("gamma", "beta", "direction", "preset")},
    "loss": "it is set by config=LSRConfig(gamma=..., beta=..., direction=...)",
    "data_collator": "ragkit makes its own batches; config=LSRConfig(prompt=...) sets the prompt",
    "model": "the trained model is that of rag_system",
}
_IN_RALT = {
    **_IN_ARGUMENTS,
    **{name: f"it goes into config=RALTConfig({name}=...)" for name in ("lora_r", "method", "max_length", "context")},
    "data_collator": "ragkit makes its own batches; the generator's prompt_template sets the prompt",
    "model": "the trained model is that of rag_system",
}


class RAGTrainMode(str, Enum):
    """The part that a manager trains."""

    RETRIEVER = "retriever"
    GENERATOR = "generator"


class _FedRAGNames:
    """What FedRAG's trainers are asked for by name."""

    data: QAData

    @property
    def train_dataset(self) -> QAData:
        """The training data, as ragkit has read them."""
        return self.data

    @property
    def hf_trainer_obj(self) -> Any:
        """Not here: an error that says what to use."""
        raise AttributeError(
            "hf_trainer_obj: the transformers.Trainer is made when train() is called; trainer.rows() are its training "
            "rows, trainer.callbacks.append(...) takes a TrainerCallback"
        )


class HuggingFaceTrainerForLSR(_FedRAGNames, LSRTrainer):
    """Trains the retriever (`ragkit.LSRTrainer`, whose settings and controls it has).

    By default with ragkit's temperatures and direction, which are the papers'; `config=LSRConfig(preset="fedrag")`
    takes FedRAG's formula. The query side is trained: with one encoder for both sides, the contexts keep a copy of it
    as it was.

    Args:
        rag_system: A `RAGSystem`; its retriever is trained in place.
        train_dataset: Queries with responses: a list of dicts, a list that holds one dict of lists, a
            `datasets.Dataset`, a `pandas.DataFrame`, or what else `ragkit.load_qa` reads.
        training_arguments: `transformers.TrainingArguments`; None: FedRAG's defaults (3 epochs, batches of 8,
            learning rate 5e-5).
        eval_dataset: Queries for `evaluate()`.
        config: `ragkit.LSRConfig`. Its `top_k`, if not set, is that of `rag_config`; its `train` is used where there
            are no training_arguments.

    Raises:
        TypeError: An unknown argument; the message says where it belongs.
        ConfigError: training_arguments hold what cannot be done, or top_k is 1.
    """

    def __init__(
        self,
        rag_system: Any,
        train_dataset: Any,
        training_arguments: Any = None,
        eval_dataset: Any = None,
        config: LSRConfig | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown("HuggingFaceTrainerForLSR", unknown, KNOWN, _IN_LSR)
        core = core_of(rag_system)
        if core.config.top_k < 2 and (config is None or "top_k" not in config.model_fields_set):
            raise ConfigError(
                "rag_config.top_k is 1, but LSR learns from how passages of one query differ: set it to 2 or more, or "
                "give the number for training alone: config=LSRConfig(top_k=8)"
            )
        made, self.unused_arguments = _settings(LSRConfig, core, config, training_arguments)
        super().__init__(core, train_dataset, made, eval_data=eval_dataset)
        self.rag_system, self.training_arguments = rag_system, training_arguments

    @property
    def model(self) -> Any:
        """The encoder that is trained."""
        return next(iter(self.system.retriever.trainable_modules("query").values()))

    def evaluate(self, examples: Any = None, **options: Any) -> EvaluationResult:
        """Scores the system; see `ragkit.LSRTrainer.evaluate`.

        Args:
            examples: Queries; None: `eval_dataset`.
            **options: Of `ragkit.evaluate`. Where no query names the passages that support its answer, retrieval
                cannot be scored: answers are generated then, for EM and F1.
        """
        data = _to_evaluate(self, examples)
        supported = any(example.supporting for example in data)
        options.setdefault("generate", not supported)
        options.setdefault("retrieve", supported or not options["generate"])
        return super().evaluate(data, **options)


class HuggingFaceTrainerForRALT(_FedRAGNames, RALTTrainer):
    """Trains the generator (`ragkit.RALTTrainer`, whose settings and controls it has).

    As FedRAG does, all weights of a `HFPretrainedModelGenerator` and the adapter of a `HFPeftModelGenerator`;
    `config=RALTConfig()` lays a new LoRA over the former.

    Args:
        rag_system: A `RAGSystem`; its generator is trained in place.
        train_dataset: As in `HuggingFaceTrainerForLSR`.
        training_arguments: As in `HuggingFaceTrainerForLSR`.
        eval_dataset: Queries for `evaluate()`.
        config: `ragkit.RALTConfig`; as in `HuggingFaceTrainerForLSR`.

    Raises:
        TypeError: An unknown argument; the message says where it belongs.
        ConfigError: training_arguments hold what cannot be done.
    """

    def __init__(
        self,
        rag_system: Any,
        train_dataset: Any,
        training_arguments: Any = None,
        eval_dataset: Any = None,
        config: RALTConfig | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown("HuggingFaceTrainerForRALT", unknown, KNOWN, _IN_RALT)
        core = core_of(rag_system)
        made, self.unused_arguments = _settings(RALTConfig, core, config, training_arguments)
        if config is None:
            made.method = "lora" if is_peft_model(core.generator.model) else "full"
        super().__init__(core, train_dataset, made, eval_data=eval_dataset)
        self.rag_system, self.training_arguments = rag_system, training_arguments

    @property
    def model(self) -> Any:
        """The language model that is trained."""
        return self.system.generator.model

    def evaluate(self, examples: Any = None, **options: Any) -> EvaluationResult:
        """Scores the system's answers (EM, F1), and retrieval where a query names the passages that support its
        answer; `examples` None: `eval_dataset`."""
        data = _to_evaluate(self, examples)
        supported = any(example.supporting for example in data)
        options.setdefault("retrieve", supported or not options.get("generate", True))
        return super().evaluate(data, **options)


class HuggingFaceRAGTrainerManager(TrainerManager):
    """Trains one part of a RAG system (`ragkit.TrainerManager`).

    Args:
        mode: "retriever" or "generator".
        retriever_trainer: A `HuggingFaceTrainerForLSR`.
        generator_trainer: A `HuggingFaceTrainerForRALT`.

    Raises:
        TypeError: A trainer of the other part, or an unknown argument.
        ValueError: An unknown mode, no trainer for the mode, or trainers of two systems.
    """

    def __init__(
        self, mode: Any, retriever_trainer: Any = None, generator_trainer: Any = None, **unknown: Any
    ) -> None:
        held = "its trainers hold it already; leave it out"
        refuse_unknown(
            type(self).__name__,
            unknown,
            ["mode", "retriever_trainer", "generator_trainer"],
            {"rag_system": held, "train_dataset": held},
        )
        if isinstance(retriever_trainer, RALTTrainer):
            raise TypeError(
                f"retriever_trainer: found a {type(retriever_trainer).__name__}, which trains the generator; the "
                "retriever is trained by HuggingFaceTrainerForLSR(rag_system, train_dataset)"
            )
        if isinstance(generator_trainer, LSRTrainer):
            raise TypeError(
                f"generator_trainer: found a {type(generator_trainer).__name__}, which trains the retriever; the "
                "generator is trained by HuggingFaceTrainerForRALT(rag_system, train_dataset)"
            )
        mode = mode.value if isinstance(mode, Enum) else mode
        super().__init__(mode, retriever_trainer, generator_trainer)

    @property
    def model(self) -> Any:
        """The model that `train` trains."""
        return getattr(self.trainer, "model", None)

    def get_federated_task(self, **settings: Any) -> HuggingFaceFLTask:
        """The training of the current mode as a federated one; see `ragkit.TrainerManager.get_federated_task`."""
        task = super().get_federated_task(**settings)
        return HuggingFaceFLTask(task.trainer, task.config, task.folder)


HuggingFaceTrainerManager = HuggingFaceRAGTrainerManager  # as the first version of FedRAG's quick start calls it


def _settings(cls: type[C], core: Any, config: C | None, arguments: Any) -> tuple[C, list[tuple[str, Any, str]]]:
    """(settings of the training, arguments that are not used)."""
    if config is not None and not isinstance(config, cls):
        raise TypeError(f"config: expected a ragkit.{cls.__name__}, found {type(config).__name__}")
    converted = convert_arguments(arguments)
    if config is None:
        made = cls(top_k=core.config.top_k, train=TrainConfig(**converted.train))
    else:
        made = config.model_copy(deep=True)
        if "top_k" not in config.model_fields_set:
            made.top_k = core.config.top_k
        if arguments is not None:
            made.train = TrainConfig(**converted.train)
    if converted.output_dir is not None:
        made.output_dir = converted.output_dir
    return made, converted.unused


def _to_evaluate(trainer: Any, examples: Any) -> QAData:
    if examples is not None:
        return trainer._load(examples)
    if trainer.eval_data is None:
        name = type(trainer).__name__
        raise DataError(
            f"nothing to evaluate on: {name}(..., eval_dataset=...) or trainer.evaluate(dataset); the training data "
            "is never taken for it"
        )
    return trainer.eval_data
