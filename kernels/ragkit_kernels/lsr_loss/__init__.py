"""The loss of LM-supervised retrieval (LSR): retrieval distribution against the language model's."""

from __future__ import annotations

from ragkit_kernels.lsr_loss.op import lsr_loss, lsr_loss_from_embeddings
from ragkit_kernels.lsr_loss.reference import (
    DIRECTIONS,
    lm_distribution,
    lsr_loss_from_embeddings_reference,
    lsr_loss_reference,
    retrieval_distribution,
)

__all__ = [
    "DIRECTIONS",
    "lm_distribution",
    "lsr_loss",
    "lsr_loss_from_embeddings",
    "lsr_loss_from_embeddings_reference",
    "lsr_loss_reference",
    "retrieval_distribution",
]
