"""The small world: a made corpus of real-world facts, its questions and graph, and the shipped tiny LM.

Everything here is package data, so a RAG system can be built, tuned and measured without a network.
`python -m ragkit.small_world.build` writes `data/`, `python -m ragkit.small_world.train_lm` trains `lm/`.
"""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The small world's folder in the GFM-RAG v1 layout: `raw/` and `processed/stage1/`."""
    return Path(__file__).parent / "data"


def lm_path() -> Path:
    """The folder of the shipped tiny LM, which `transformers.AutoModelForCausalLM` loads."""
    return Path(__file__).parent / "lm"
