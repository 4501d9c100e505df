"""Settings that several runs share: how a training runs, the RAG system, the data."""

from __future__ import annotations

from typing import Literal

from ragkit.settings import Config, setting


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
        "linear",
        "After the warm-up the learning rate goes down to 0 in a line (linear) or a wave (cosine), or not (constant).",
    )
    weight_decay: float = setting(
        0.0,
        "Decoupled weight decay: at each step weights shrink by this times the learning rate (AdamW).",
        unit="share per unit of rate",
        ge=0,
        le=1,
    )
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
    store: Literal["memory", "qdrant"] = setting(
        "memory", "Where passages and their vectors are kept: memory of this process, or qdrant, a vector database."
    )
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
    answer_from: Literal["joined", "ensemble"] = setting(
        "joined",
        "How the generator reads its passages: joined in one prompt, or (ensemble) each in a prompt of its own, with "
        "the predictions mixed by how well it was retrieved (RA-DIT, REPLUG).",
    )
    ensemble_gamma: float = setting(
        0.05,
        "Temperature of the weights of an ensemble: softmax(similarity / ensemble_gamma).",
        unit="similarity",
        gt=0,
        le=100,
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
        form="auto, cpu, mps, cuda or cuda:N",
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
    max_train: int | None = setting(
        None, "Uses a sample of so many training questions, the same in every run.", unit="questions", ge=1
    )
    max_test: int | None = setting(
        None, "Uses a sample of so many test questions, the same in every run.", unit="questions", ge=1
    )
    columns: dict[str, str] = setting(
        {}, "Own column names, for example {question: q, answer: a, supporting: gold_ids}."
    )
