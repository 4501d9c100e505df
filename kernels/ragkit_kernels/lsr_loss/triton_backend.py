"""Triton backend of the LSR loss: hands tensors on a GPU to the kernels of triton_kernels.py.

The functions and their meaning are those of torch_backend.py. Any strides; sums and results are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit_kernels.lsr_loss import triton_kernels
from ragkit_kernels.lsr_loss.reference import DIRECTIONS
from ragkit_kernels.lsr_loss.torch_backend import shared_backward, shared_scores
from ragkit_kernels.triton_tools import launch

MAX_ROW = 1024  # passages that a program holds at once; beyond that it reads its row twice
MAX_FUSED = 64  # passages whose embeddings one program multiplies; beyond that there are programs enough to share them
BLOCK_WIDE = 1024


def tile_of(block: int) -> dict[str, int]:
    """A program's tile of embeddings: 2048 elements, 16 float32 registers of each thread; tiles in flight."""
    return {"BLOCK_K": block, "BLOCK_D": 2048 // block, "STAGES": 3}


def _strided(tensor: Tensor | None) -> tuple[Tensor | int | None, ...]:
    """A tensor [B, ...] with all its strides; booleans as bytes."""
    if tensor is None:
        return None, 0, 0
    return (tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, *tensor.stride())


def block_of(K: int) -> int:
    """Passages of a program, padded to a power of two."""
    return max(16, 1 << (K - 1).bit_length())


def loss_forward(
    scores: Tensor, lm_scores: Tensor, mask: Tensor | None, gamma: float, beta: float, direction: str
) -> tuple[Tensor, Tensor]:
    """losses [B] and d losses / d scores [B, K]."""
    dscores = scores.new_empty(scores.shape, dtype=torch.float32)
    return _rows(scores, lm_scores, mask, gamma, beta, direction, dscores), dscores


def _rows(
    scores: Tensor, lm_scores: Tensor, mask: Tensor | None, gamma: float, beta: float, direction: str, dscores: Tensor
) -> Tensor:
    """The losses; their gradient is written into `dscores`, which may be `scores`."""
    B, K = scores.shape
    losses = scores.new_empty(B, dtype=torch.float32)
    block = block_of(K) if K <= MAX_ROW else BLOCK_WIDE
    launch(
        triton_kernels.row_kernel if K <= MAX_ROW else triton_kernels.wide_kernel, (B,),
        *_strided(scores), *_strided(lm_scores), *_strided(mask), losses, dscores, float(gamma), float(beta), K,
        num_warps=4 if block > 128 else 1, SEEK=direction == DIRECTIONS[0], BLOCK_K=block,
    )  # fmt: skip
    return losses


def embeddings_forward(
    queries: Tensor,
    passages: Tensor,
    lm_scores: Tensor,
    mask: Tensor | None,
    gamma: float,
    beta: float,
    direction: str,
) -> tuple[Tensor, Tensor]:
    """`loss_forward` of queries[b] · passages[b, k], or · passages[k] where all questions share them."""
    B, K = lm_scores.shape
    D = queries.shape[1]
    if passages.ndim == 2:
        scores = shared_scores(queries, passages)
        return _rows(scores, lm_scores, mask, gamma, beta, direction, scores), scores
    dscores = queries.new_empty(B, K, dtype=torch.float32)
    both = (*_strided(queries), *_strided(passages))
    if K > MAX_FUSED:
        launch(triton_kernels.dot_kernel, (B, -(-K // 16)), *both, *_strided(mask), dscores, K, D, **tile_of(16))
        return _rows(dscores, lm_scores, mask, gamma, beta, direction, dscores), dscores
    losses = queries.new_empty(B, dtype=torch.float32)
    launch(
        triton_kernels.embedding_kernel, (B,),
        *both, *_strided(lm_scores), *_strided(mask), losses, dscores, float(gamma), float(beta), K, D,
        SEEK=direction == DIRECTIONS[0], **tile_of(block_of(K)),
    )  # fmt: skip
    return losses, dscores


def embeddings_backward(
    grad: Tensor, dscores: Tensor, queries: Tensor, passages: Tensor, masked: bool, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and passages for that of the losses [B]; an empty tensor for one that is not needed."""
    if passages.ndim == 2:
        return shared_backward(grad, dscores, queries, passages, masked, needs)
    B, K, D = passages.shape
    dqueries = queries.new_empty(queries.shape if needs[0] else 0)
    dpassages = passages.new_empty(passages.shape if needs[1] else 0)
    tile = tile_of(16)
    launch(
        triton_kernels.embedding_backward_kernel, (B, -(-D // tile["BLOCK_D"])),
        grad.contiguous(), dscores, *_strided(queries), *_strided(passages), dqueries if needs[0] else None,
        dpassages if needs[1] else None, K, D, **tile,
    )  # fmt: skip
    return dqueries, dpassages
