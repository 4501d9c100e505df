"""The settings of every run: one class per command, read alike by code, YAML, the command line, `--help` and forms.

The machinery (YAML, overrides, messages) is in `ragkit.settings`; here are only the settings themselves.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ragkit.gfm_config import (
    EntityModelConfig,
    GFMEvaluateConfig,
    GFMFinetuneConfig,
    GFMFinetuneTask,
    GFMModelConfig,
    GFMPretrainConfig,
    GFMTrainConfig,
    LossConfig,
    OptimizerConfig,
    RankerConfig,
)
from ragkit.settings import Config, ConfigError, Problem, group, help_text, load_config, setting

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "GFMEvaluateConfig",
    "GFMFinetuneConfig",
    "GFMPretrainConfig",
    "LSRConfig",
    "Problem",
    "QueryConfig",
    "QuickstartConfig",
    "RAGConfig",
    "RALTConfig",
    "TrainConfig",
    "help_text",
    "load_config",
]


class TrainConfig(Config):
    """How a training runs: batches, optimizer, schedule, precision, checkpoints. The same for every trainer."""

    batch_size: int = setting(
        16, "Questions (LSR) or instances (RALT) in one step on one device.", unit="examples", ge=1
    )
    learning_rate: float = setting(2e-5, "Peak learning rate of AdamW.", unit="weight change per step", gt=0, le=10)
    num_epochs: float = setting(1.0, "How often the training data is gone through.", unit="epochs", gt=0)
    max_steps: int | None = setting(
        None, "Ends training after this many optimizer steps; overrides num_epochs.", unit="steps", ge=1
    )
    warmup_steps: int | float = setting(
        10,
        "Steps over which the learning rate rises to its peak; below 1: that share of all steps.",
        unit="steps",
        ge=0,
    )
    schedule: Literal["linear", "cosine", "constant"] = setting(
        "linear", "How the learning rate goes on after the warm-up."
    )
    weight_decay: float = setting(0.0, "Decoupled weight decay of AdamW.", unit="share per unit of rate", ge=0, le=1)
    max_grad_norm: float = setting(
        1.0, "Gradients are scaled down to this L2 norm at most; 0 turns clipping off.", unit="gradient norm", ge=0
    )
    gradient_accumulation_steps: int = setting(
        1, "Batches whose gradients are added up before one optimizer step.", unit="batches", ge=1
    )
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "Number format of the forward and backward pass; fp16 needs a GPU."
    )
    gradient_checkpointing: bool = setting(
        False, "Recomputes activations in the backward pass: less memory, about a third slower."
    )
    seed: int = setting(0, "Seed of the data order, dropout and new weights.", unit="seed number", ge=0, lt=2**32)
    logging_steps: int = setting(1, "An event is written every so many steps.", unit="steps", ge=1)
    save_steps: int | None = setting(
        50,
        "A checkpoint is saved every so many steps, and at the end and on stop; null: only then.",
        unit="steps",
        ge=1,
    )
    eval_steps: int | None = setting(
        None, "The evaluation data is scored every so many steps; null: never while training.", unit="steps", ge=1
    )
    save_total_limit: int = setting(
        2, "How many checkpoints are kept; the oldest goes first.", unit="checkpoints", ge=1
    )
    num_threads: int | None = setting(
        None, "CPU threads of PyTorch; null: as PyTorch is set already.", unit="threads", ge=1, le=1024
    )
    report_to: list[str] = setting([], 'Loggers of transformers to report to, for example ["tensorboard"].')


class RAGConfig(Config):
    """A RAG system: its encoder, store, language model and prompt."""

    retriever: str = setting(
        "default",
        'sentence-transformers model: hub name or folder; "default" is the installed MiniLM.',
        min_length=1,
    )
    passage_retriever: str | None = setting(
        None, "Second encoder for the passages (dual encoder); null: one encoder for both."
    )
    query_prompt: str = setting("", "Text put before every question when it is encoded.")
    passage_prompt: str = setting("", "Text put before every passage when it is encoded.")
    max_passage_tokens: int | None = setting(
        None,
        'Longer texts are cut by the encoder; null: 160 for "default", else the model\'s own limit.',
        unit="tokens",
        ge=1,
    )
    generator: str = setting(
        "default", 'Causal language model: hub name or folder; "default" is the shipped tiny LM.', min_length=1
    )
    adapter: str | None = setting(None, "Folder or hub name of a PEFT adapter laid over the generator.")
    store: Literal["memory", "qdrant"] = setting("memory", "Where the passages and their vectors are kept.")
    qdrant_url: str | None = setting(None, "Address of a Qdrant server; null: embedded.")
    qdrant_path: str | None = setting(
        None,
        'Folder of the embedded Qdrant; null (and no URL): "qdrant_store" in the working directory; ":memory:": none.',
    )
    collection: str = setting("ragkit", "Name of the Qdrant collection.", min_length=1)
    top_k: int = setting(3, "Passages given to the generator for a question.", unit="passages", ge=1)
    prompt: str = setting(
        "sources", "Name of a prompt template, or a text that holds {question} and {passages}.", min_length=1
    )
    chat_template: bool = setting(False, "Wraps the prompt in the tokenizer's chat template.")
    system_prompt: str | None = setting(None, "System message of the chat template; null: none.")
    max_new_tokens: int = setting(32, "Longest answer.", unit="tokens", ge=1)
    max_prompt_tokens: int | None = setting(
        None, "Longest prompt, passages are cut to fit; null: what the model's context leaves.", unit="tokens", ge=8
    )
    device: str = setting(
        "auto",
        '"auto" (GPU if there is one), "cpu", "cuda", "cuda:1" or "mps".',
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "float32", "Number format of the generator's weights; auto: as stored."
    )
    encode_batch_size: int = setting(64, "Texts encoded at once.", unit="texts", ge=1)
    generate_batch_size: int = setting(16, "Prompts generated from at once.", unit="prompts", ge=1)
    trust_remote_code: bool = setting(False, "Lets models from the hub run their own Python code.")


class DataConfig(Config):
    """The passages and questions a command works on."""

    corpus: str = setting(
        "small_world",
        'Passages: dataset_corpus.json, a JSONL file, a folder in GFM-RAG layout, or "small_world" (shipped).',
        min_length=1,
    )
    train: str | None = setting(None, "Training questions: a file, or the name of a split; null: the corpus's own.")
    test: str | None = setting(None, "Test questions: a file, or the name of a split; null: the corpus's own.")
    max_train: int | None = setting(None, "Uses only the first so many training questions.", unit="questions", ge=1)
    max_test: int | None = setting(None, "Uses only the first so many test questions.", unit="questions", ge=1)
    columns: dict[str, str] = setting(
        {}, "Own column names, for example {question: q, answer: a, supporting: gold_ids}."
    )


LSR_PRESETS: dict[str, dict[str, Any]] = {
    # REPLUG LSR (Shi et al. 2023, arXiv:2301.12652): both temperatures 0.1, KL from the retriever to the LM. The paper
    # divides the probability itself; here it is the mean log-prob, which does not underflow on long answers.
    "replug": {"gamma": 0.1, "beta": 0.1, "score": "mean_logprob", "direction": "KL(P_R||Q_LM)"},
    # RA-DIT (Lin et al. 2023, arXiv:2310.01352): sharp target (0.01), only the query encoder is trained. Its dot
    # products are not normalised (no gamma); ours are cosines, which need one to leave the flat part of the softmax.
    "ra_dit": {
        "gamma": 0.05,
        "beta": 0.01,
        "score": "mean_logprob",
        "direction": "KL(P_R||Q_LM)",
        "train_part": "query",
    },
}


class LSRConfig(Config):
    """Fine-tunes the retriever from the language model's own scores of the passages (LSR)."""

    preset: Literal["replug", "ra_dit"] | None = setting(
        None, "Values of a paper for the settings that you leave alone; null: ragkit's defaults."
    )
    data: DataConfig = group(DataConfig(), "passages and questions")
    rag: RAGConfig = group(RAGConfig(), "the RAG system whose retriever is trained")
    system: str | None = setting(
        None, "Folder of a saved RAG system to go on from; null: a new one, built from data and rag."
    )
    train: TrainConfig = group(TrainConfig(learning_rate=2e-5, batch_size=16), "batches, optimizer, checkpoints")
    top_k: int = setting(8, "Passages scored for each question while training (K).", unit="passages", ge=2)
    gamma: float = setting(
        0.05, "Temperature of the retriever: P_R = softmax(similarity / gamma).", unit="similarity", gt=0, le=100
    )
    beta: float = setting(1.0, "Temperature of the LM: Q_LM = softmax(score / beta).", unit="nats", gt=0, le=1000)
    direction: Literal["KL(P_R||Q_LM)", "KL(Q_LM||P_R)"] = setting(
        "KL(P_R||Q_LM)", "Which divergence is made small; the first is the papers'."
    )
    score: Literal["mean_logprob", "logprob"] = setting(
        "mean_logprob", "LM score of a passage: log-prob of the answer per token, or in sum."
    )
    prompt: str = setting("plain", "Template that holds question and ONE passage when the LM scores it.", min_length=1)
    include_eos: bool = setting(True, "Counts the end-of-text token as part of the answer when scoring.")
    train_part: Literal["query", "both"] = setting(
        "query", "Encoder that learns: the query side only (the index stays valid), or both (re-indexed at the end)."
    )
    freeze_embeddings: bool = setting(True, "Leaves the encoder's word embeddings as they are.")
    score_batch_size: int = setting(
        64, "Pairs of question and passage that the LM scores at once.", unit="pairs", ge=1
    )
    output_dir: str = setting("runs", "Folder that holds the run folders.", min_length=1)
    name: str | None = setting(None, "Name of the run folder; null: command and time.")
    resume: str | None = setting(None, "Run folder to go on with; its settings are taken from its config.yaml.")

    @model_validator(mode="after")
    def _fill_preset(self) -> LSRConfig:
        """A preset fills only what the user did not set."""
        for name, value in LSR_PRESETS.get(self.preset or "", {}).items():
            if name not in self.model_fields_set:
                self.__dict__[name] = value  # an assignment would run this validator again, without end
        return self


class RALTConfig(Config):
    """Fine-tunes the generator on questions with their retrieved passages (RALT)."""

    data: DataConfig = group(DataConfig(), "passages and questions")
    rag: RAGConfig = group(RAGConfig(), "the RAG system whose generator is trained")
    system: str | None = setting(
        None, "Folder of a saved RAG system to go on from; null: a new one, built from data and rag."
    )
    train: TrainConfig = group(TrainConfig(learning_rate=1e-3, batch_size=16), "batches, optimizer, checkpoints")
    method: Literal["lora", "full"] = setting("lora", "Trains low-rank adapters (PEFT), or all weights.")
    lora_r: int = setting(16, "Rank of the adapters.", unit="dimensions", ge=1)
    lora_alpha: float = setting(32, "Adapters are scaled by lora_alpha / lora_r.", unit="factor times rank", gt=0)
    lora_dropout: float = setting(0.0, "Share of the adapter inputs dropped while training.", unit="share", ge=0, lt=1)
    lora_targets: list[str] | None = setting(None, "Names of the layers with adapters; null: all linear layers.")
    top_k: int = setting(3, "Passages retrieved for each training question.", unit="passages", ge=1)
    context: Literal["each", "joined"] = setting(
        "each",
        "One instance for each passage (RA-DIT), or one instance that holds all of them, as inference sees them.",
    )
    shuffle_passages: bool = setting(
        False,
        "Mixes the passages of a joined instance: the model then learns less to trust the order of the retriever.",
    )
    add_gold: bool = setting(False, "Puts a supporting passage in where retrieval missed it (training only).")
    max_length: int | None = setting(
        None,
        "Longest instance, prompt and answer; the passages are cut to fit; null: the model's context.",
        unit="tokens",
        ge=16,
    )
    output_dir: str = setting("runs", "Folder that holds the run folders.", min_length=1)
    name: str | None = setting(None, "Name of the run folder; null: command and time.")
    resume: str | None = setting(None, "Run folder to go on with; its settings are taken from its config.yaml.")


class EvaluateConfig(Config):
    """Scores a RAG system: recall@k, all@k, MRR, nDCG, exact match and F1 with 95 % intervals."""

    data: DataConfig = group(DataConfig(), "passages and questions")
    rag: RAGConfig = group(RAGConfig(), "the RAG system, where no saved one is given")
    system: str | None = setting(None, "Folder of a saved RAG system; null: built from data and rag.")
    ks: list[Annotated[int, Field(ge=1)]] = setting(
        [1, 2, 5, 10], "Cut-offs k of recall@k, all@k and nDCG@k.", unit="passages", min_length=1
    )
    generate: bool = setting(True, "Generates answers too (EM, F1); false: retrieval only.")
    bootstrap: int = setting(2000, "Resamples behind the intervals.", unit="resamples", ge=100, le=1_000_000)
    seed: int = setting(0, "Seed of the resampling.", unit="seed number", ge=0, lt=2**32)
    output: str | None = setting(None, "JSON file for the scores of every question; null: only printed.")


class QueryConfig(Config):
    """Answers questions and shows the passages behind each answer."""

    question: list[str] = setting([], "The questions; one text, or a list.")
    data: DataConfig = group(DataConfig(), "the passages that are searched")
    rag: RAGConfig = group(RAGConfig(), "the RAG system, where no saved one is given")
    system: str | None = setting(None, "Folder of a saved RAG system; null: built from data and rag.")
    top_k: int | None = setting(None, "Passages per question; null: rag.top_k.", unit="passages", ge=1)


class QuickstartConfig(Config):
    """The whole round on the small world: score, LSR, RALT, GFM, score again, controls, three questions, save."""

    rag: RAGConfig = group(RAGConfig(), "the RAG system")
    lsr: LSRConfig = group(
        # Minutes long and never resumed: no checkpoints on the way.
        LSRConfig(train=TrainConfig(max_steps=125, batch_size=16, learning_rate=2e-5, save_steps=None)),
        "training of the retriever (its data, rag, system and output_dir are not used)",
    )
    ralt: RALTConfig = group(
        RALTConfig(
            context="joined",
            add_gold=True,
            train=TrainConfig(max_steps=280, batch_size=8, learning_rate=3e-3, save_steps=None),
        ),
        "training of the generator (its data, rag, system and output_dir are not used)",
    )
    gfm: GFMFinetuneConfig = group(
        GFMFinetuneConfig(
            model=GFMModelConfig(entity_model=EntityModelConfig(input_dim=32, hidden_dims=[32] * 3)),
            task=GFMFinetuneTask(
                losses=[
                    LossConfig(name="bce", weight=0.3),
                    LossConfig(name="listce", weight=0.7),
                    LossConfig(name="listce", weight=1.0, is_doc_loss=True),
                ]
            ),
            doc_ranker=RankerConfig(name="score_weighted_idf"),
            optimizer=OptimizerConfig(lr=2e-3),
            train=GFMTrainConfig(batch_size=16, max_steps=160, eval_steps=20, eval_batch_size=64),
        ),
        "training of the graph retriever (its datasets, device and output_dir are not used)",
    )
    n_graph: int = setting(
        0,
        "One-hop training questions of the graph retriever beside all two-hop ones; they teach it to stop early.",
        unit="questions",
        ge=0,
    )
    n_train: int = setting(1000, "Training questions of both trainings.", unit="questions", ge=2)
    n_test: int = setting(300, "Held-out questions scored before and after.", unit="questions", ge=10)
    seed: int = setting(0, "Seed of both trainings and of the intervals.", unit="seed number", ge=0, lt=2**32)
    controls: bool = setting(True, "Also trains with a shuffled teacher and with random passages, for comparison.")
    bootstrap: int = setting(2000, "Resamples behind the intervals.", unit="resamples", ge=100, le=1_000_000)
    output_dir: str = setting("runs", "Folder that holds the run folders and the saved system.", min_length=1)
