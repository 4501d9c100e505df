"""Sets of values for a run: a minute on a CPU, a free T4 on Colab, and the papers' own.

A preset is a start, not a cage: `preset(LSRConfig, "cpu-minute", top_k=4)` changes what it gives, and so does a form.
"""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from ragkit.config import GFMFinetuneConfig, GFMPretrainConfig, LSRConfig, RALTConfig
from ragkit.settings import Config, deep_merge

C = TypeVar("C", bound=Config)

PRESETS = {
    "cpu-minute": "About a minute of training on two CPU cores, with the shipped small world and tiny models.",
    "colab-t4": "One GPU with 16 GB such as Colab's free T4: small models from the hub, fp16, memory-minded batches.",
    "full": "The papers' settings, for one or several GPUs with 80 GB; name your own data, and expect hours or days.",
}

# ---- the hub's models that fit a T4 beside each other ----

_BGE = {
    "retriever": "BAAI/bge-small-en-v1.5",
    # What its model card puts before a question.
    "query_prompt": "Represent this sentence for searching relevant passages: ",
}
_QWEN = {"generator": "Qwen/Qwen2.5-0.5B-Instruct", "chat_template": True}
_BGE_TEXTS = {"text_emb_model_name": _BGE["retriever"], "query_instruct": _BGE["query_prompt"]}

# ---- the graph model ----

_TINY_GFM = {"entity_model": {"input_dim": 32, "hidden_dims": [32] * 3}}
_T4_GFM = {"entity_model": {"input_dim": 128, "hidden_dims": [128] * 6}}
_T4_GFM_TRAIN = {"batch_size": 8, "precision": "fp16", "gradient_checkpointing": True}
# GFM-RAG (Luo et al. 2025, arXiv:2502.01113), table 16 and appendix D: 6 layers of 512 over all-mpnet-base-v2, AdamW
# with rate 5e-4, 4 questions or triples a GPU on 8 GPUs. Model and rate are our defaults; here they stand in full.
_PAPER_GFM = {
    "text_emb_model": {"text_emb_model_name": "sentence-transformers/all-mpnet-base-v2"},
    "model": {"entity_model": {"input_dim": 512, "hidden_dims": [512] * 6}},
    "optimizer": {"lr": 5e-4},
}
# The document loss trains what is asked for, and its ranker keeps how sure the model is (notebook 06).
_DOCUMENT_LOSSES = {
    "task": {
        "losses": [
            {"name": "bce", "weight": 0.3},
            {"name": "listce", "weight": 0.7},
            {"name": "listce", "weight": 1.0, "is_doc_loss": True},
        ]
    },
    "doc_ranker": {"name": "score_weighted_idf"},
}

_VALUES: dict[type[Config], dict[str, dict[str, Any]]] = {
    LSRConfig: {
        "cpu-minute": {
            "data": {"max_train": 320, "max_test": 200},
            "rag": {"prompt": "plain"},
            "train": {"max_steps": 60, "batch_size": 16, "learning_rate": 2e-5},
            "top_k": 8,
        },
        "colab-t4": {
            # The language model only scores here: half precision is enough. No gradient checkpointing: LSR refuses it.
            "rag": {**_BGE, **_QWEN, "dtype": "float16"},
            "train": {"batch_size": 32, "learning_rate": 2e-5, "warmup_steps": 0.1, "precision": "fp16"},
            "top_k": 8,
            "score_batch_size": 32,
        },
        # REPLUG LSR (Shi et al. 2023, arXiv:2301.12652), training setup: Contriever, 20 passages, temperatures 0.1,
        # batch 64, rate 2e-5, warm-up over a tenth of 25,000 steps, passages encoded anew every 3,000 steps. Its GPT-3
        # Curie cannot be had; an open model of like size scores here.
        "full": {
            "preset": "replug",
            "rag": {"retriever": "facebook/contriever", "generator": "Qwen/Qwen2.5-7B", "dtype": "bfloat16"},
            "train": {
                "max_steps": 25_000,
                "batch_size": 64,
                "learning_rate": 2e-5,
                "warmup_steps": 0.1,
                "precision": "bf16",
                "save_steps": 1000,
            },
            "top_k": 20,
            "refresh_steps": 3000,
            "train_part": "both",
        },
    },
    RALTConfig: {
        "cpu-minute": {
            "data": {"max_train": 800, "max_test": 200},
            "rag": {"prompt": "plain"},
            "train": {"max_steps": 150, "batch_size": 8, "learning_rate": 3e-3},
            "lora_r": 16,
            "top_k": 3,
            "context": "joined",
            "add_gold": True,
        },
        "colab-t4": {
            # Weights stay float32 (2 GB): fp16 trains through autocast, and its loss scaling needs float32 weights.
            "rag": {**_BGE, **_QWEN},
            "train": {
                "batch_size": 4,
                "gradient_accumulation_steps": 4,
                "learning_rate": 2e-4,
                "warmup_steps": 0.1,
                "precision": "fp16",
                "gradient_checkpointing": True,
            },
            "context": "joined",
            "max_length": 1024,
        },
        # RA-DIT (Lin et al. 2023, arXiv:2310.01352), LM fine-tuning: all weights, 3 passages, each in an instance of
        # its own, rate 1e-5 with a cosine, 200 steps of warm-up, 500 steps of 64. Its LLaMA of 7 to 65 billion
        # parameters take several GPUs to train whole; this model fits one with 80 GB. Its retriever DRAGON+ is not in
        # the form of sentence-transformers; a general one stands in.
        "full": {
            "rag": {"retriever": "sentence-transformers/all-mpnet-base-v2", "generator": "Qwen/Qwen2.5-1.5B"},
            "train": {
                "max_steps": 500,
                "batch_size": 8,
                "gradient_accumulation_steps": 8,
                "learning_rate": 1e-5,
                "warmup_steps": 200,
                "schedule": "cosine",
                "precision": "bf16",
                "gradient_checkpointing": True,
            },
            "method": "full",
            "top_k": 3,
            "context": "each",
        },
    },
    GFMPretrainConfig: {
        "cpu-minute": {
            "model": _TINY_GFM,
            "optimizer": {"lr": 5e-3},
            "train": {"max_steps": 300, "batch_size": 16, "eval_steps": 50, "eval_batch_size": 64},
            "task": {"num_negative": 64, "valid_share": 0.1},
        },
        "colab-t4": {"text_emb_model": _BGE_TEXTS, "model": _T4_GFM, "train": _T4_GFM_TRAIN},
        # As above; 30,000 steps with 128 negatives (appendix D), all of which are one epoch over 60 graphs.
        "full": {
            **_PAPER_GFM,
            "train": {"batch_size": 4, "max_steps": 30_000, "eval_steps": 3000, "save_steps": 1000},
            "task": {"num_negative": 128},
        },
    },
    GFMFinetuneConfig: {
        "cpu-minute": {
            "datasets": {"valid_share": 0.15},
            "model": _TINY_GFM,
            "optimizer": {"lr": 2e-3},
            "train": {"max_steps": 160, "batch_size": 16, "eval_steps": 20, "eval_batch_size": 64},
            **_DOCUMENT_LOSSES,
        },
        "colab-t4": {
            "text_emb_model": _BGE_TEXTS,
            "model": _T4_GFM,
            "train": {**_T4_GFM_TRAIN, "num_epoch": 5},
            **_DOCUMENT_LOSSES,
        },
        # As above; 5 epochs (table 7), 0.3 BCE + 0.7 ListCE on entities and the ranker idf_topk. The paper starts from
        # its pre-trained model: name yours in train.checkpoint.
        "full": {
            **_PAPER_GFM,
            "train": {"batch_size": 4, "num_epoch": 5},
            "task": {"losses": [{"name": "bce", "weight": 0.3}, {"name": "listce", "weight": 0.7}]},
            "doc_ranker": {"name": "idf_topk"},
        },
    },
}


def preset(cls: type[C], name: str, **over: Any) -> C:
    """Settings by the name of a preset.

    Args:
        cls: `LSRConfig`, `RALTConfig`, `GFMPretrainConfig` or `GFMFinetuneConfig`.
        name: "cpu-minute", "colab-t4" or "full"; `PRESETS` says what each is for.
        **over: Values laid over the preset's, groups in part: `train={"max_steps": 10}` keeps its batch size.

    Raises:
        ValueError: There are no presets for the class, or none of this name.
        ConfigError: A value of `over` is wrong.
    """
    known = presets_of(cls)
    if not known:
        classes = ", ".join(kind.__name__ for kind in _VALUES)
        raise ValueError(f"there are no presets for {getattr(cls, '__name__', cls)!s}; there are some for {classes}")
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
        hint = f'did you mean "{near[0]}"? ' if near else ""
        raise ValueError(f"unknown preset {name!r}; {hint}the presets are {', '.join(known)}")
    given = {key: value.explicit() if isinstance(value, Config) else value for key, value in over.items()}
    return cls(**deep_merge(_VALUES[cls][name], given))


def presets_of(cls: type[Config]) -> list[str]:
    """The names of a class's presets; none for a class without."""
    return list(_VALUES.get(cls, {}))
