"""The settings of every run: one class per command, read alike by code, YAML, the command line, `--help` and forms.

The machinery (YAML, overrides, messages) is in `ragkit.settings`; here are only the settings themselves.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ragkit.base_config import DataConfig, RAGConfig, TrainConfig
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
from ragkit.lsr_config import LSRConfig
from ragkit.ralt_config import RALTConfig
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
        # Minutes long and never resumed: no checkpoints on the way. The last weights, because the control with the
        # shuffled teacher is to show what training does, not that it is undone.
        LSRConfig(keep="last", train=TrainConfig(max_steps=125, batch_size=16, learning_rate=2e-5, save_steps=None)),
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
