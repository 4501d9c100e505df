"""Which compiled forms of the LSR loss's kernels are shipped, for the checks that need no GPU (registers, spills).

The list is recorded from the launchers themselves, so it cannot differ from what they launch.
"""

from __future__ import annotations

import torch

from ragkit_kernels.lsr_loss import triton_backend as backend
from ragkit_kernels.lsr_loss.reference import DIRECTIONS
from ragkit_kernels.triton_tools import Launch, recording


def shipped_launches(dtype: torch.dtype) -> list[Launch]:
    """What the backend launches for scores and embeddings of one dtype; nothing is run.

    For 10 passages (the usual number), the most that each kernel holds, and rows of any length; with a mask, without
    which there is less of the same code.
    """
    with recording() as launches:
        for direction in DIRECTIONS:
            for K in (10, backend.MAX_ROW, backend.MAX_ROW + 1):
                scores, lm_scores, mask = torch.zeros(2, K, dtype=dtype), torch.zeros(2, K), torch.ones(2, K).bool()
                backend.loss_forward(scores, lm_scores, mask, 0.1, 1.0, direction)
        for K in (10, backend.MAX_FUSED, backend.MAX_ROW):
            _embeddings(dtype, K, DIRECTIONS[0])
    return launches


def _embeddings(dtype: torch.dtype, K: int, direction: str) -> None:
    """Forward and backward from the embeddings of K passages each."""
    queries, passages = torch.zeros(2, 1024, dtype=dtype), torch.zeros(2, K, 1024, dtype=dtype)
    lm_scores, mask = torch.zeros(2, K), torch.ones(2, K).bool()
    losses, dscores = backend.embeddings_forward(queries, passages, lm_scores, mask, 0.1, 1.0, direction)
    backend.embeddings_backward(losses, dscores, queries, passages, True, [True, True])
