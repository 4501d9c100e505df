"""The settings of RALT, the training of the generator."""

from __future__ import annotations

from typing import Literal

from ragkit.base_config import DataConfig, RAGConfig, TrainConfig
from ragkit.settings import Config, group, setting


class RALTConfig(Config):
    """Fine-tunes the generator on questions with their retrieved passages (RALT)."""

    data: DataConfig = group(DataConfig(), "passages and questions")
    rag: RAGConfig = group(RAGConfig(), "the RAG system whose generator is trained")
    system: str | None = setting(
        None, "Folder of a saved RAG system to go on from; null: a new one, built from data and rag."
    )
    train: TrainConfig = group(TrainConfig(learning_rate=1e-3, batch_size=16), "batches, optimizer, checkpoints")
    method: Literal["lora", "dora", "full"] = setting(
        "lora", "Trains low-rank adapters (PEFT); dora: the lengths of the weights' rows too; full: all weights."
    )
    lora_r: int = setting(16, "Rank of the adapters.", unit="dimensions", ge=1)
    lora_alpha: float = setting(32, "Adapters are scaled by lora_alpha / lora_r.", unit="factor times rank", gt=0)
    lora_rslora: bool = setting(False, "Scales adapters by lora_alpha / sqrt(lora_r): steadier at high rank.")
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
    passage_weights: Literal["none", "retrieval"] = setting(
        "none",
        "retrieval: with context=each, an instance counts as much as its passage was likely to be retrieved, K times "
        "softmax(similarity / weights_gamma); none: all alike, as in RA-DIT.",
    )
    weights_gamma: float = setting(0.05, "Temperature of passage_weights.", unit="similarity", gt=0, le=100)
    fused_loss: bool = setting(
        True, "Computes the loss without the logits of the prompt and in blocks: the same loss with less memory."
    )
    packing: bool = setting(
        False,
        "Puts several instances into one row, kept apart in attention, in place of padding; needs a model that can.",
    )
    max_length: int | None = setting(
        None,
        "Longest instance, prompt and answer; the passages are cut to fit; null: the model's context.",
        unit="tokens",
        ge=16,
    )
    output_dir: str = setting("runs", "Folder that holds the run folders.", min_length=1)
    name: str | None = setting(None, "Name of the run folder; null: command and time.")
    resume: str | None = setting(None, "Run folder to go on with; its settings are taken from its config.yaml.")
