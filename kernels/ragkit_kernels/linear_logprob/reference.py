"""Plain PyTorch reference of `token_logprobs`: the semantics that every faster version must reproduce."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# One chunk of logits holds about this many numbers (128 MiB in float32) unless the caller says otherwise.
CHUNK_LOGITS = 2**25


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Log-probability of one target token per row, without ever holding all the logits.

    For row n with hidden state h_n and target t_n, over a vocabulary of V rows w_v (and biases b_v):

        log p(t_n | h_n) = h_n·w_t + b_t − log Σ_v exp(h_n·w_v + b_v)

    which is minus the token's cross-entropy. The idea of keeping only a block of the logits is that of Cut
    Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009, section 4) and of Liger-Kernel's fused linear cross-entropy
    (Hsu et al. 2024, arXiv:2410.10989); here the blocks are runs of rows. In the backward pass each block is computed
    again, so training keeps no more logits than scoring does.

    Args:
        hidden: [N, D] hidden states at the positions that predict the targets, any floating dtype.
        weight: [V, D] the head's weight, same dtype and device as `hidden`.
        targets: [N] int64 token ids in 0..V-1.
        bias: [V] the head's bias, or None.
        chunk_rows: Rows whose logits exist at once (a block of chunk_rows × V). None: as many as make 2**25 logits,
            128 MiB in float32.

    Returns:
        [N] log-probabilities in nats, float32 (float64 if the inputs are float64). The logits are made in the inputs'
        dtype, as the model's own head makes them, and go into the log-sum-exp in float32.

    Raises:
        ValueError: Shapes that do not fit together, a target outside the vocabulary, or chunk_rows < 1.
    """
    _check(hidden, weight, targets, bias, chunk_rows)
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    step = chunk_rows or max(1, CHUNK_LOGITS // max(1, vocabulary))
    parts = []
    for start in range(0, max(rows, 1), step):  # one empty block for N = 0 keeps dtype, device and graph
        block, wanted = hidden[start : start + step], targets[start : start + step]  # [C, D], [C]
        if torch.is_grad_enabled() and rows > step:
            parts.append(
                checkpoint(_block, block, weight, wanted, bias, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            parts.append(_block(block, weight, wanted, bias))
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # [N]


def _block(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)  # [C, D] x [V, D] -> [C, V]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    picked = logits.gather(1, targets[:, None]).squeeze(1)  # [C, V] -> [C]
    return picked - logits.logsumexp(1)  # [C]


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, chunk_rows: int | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "token_logprobs wants hidden [N, D] and weight [V, D] with one D; "
            f"found {list(hidden.shape)} and {list(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"token_logprobs wants targets [{hidden.shape[0]}], found {list(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"token_logprobs wants bias [{weight.shape[0]}], found {list(bias.shape)}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, found {chunk_rows}")
    if targets.device.type == "cpu" and targets.numel():  # on a GPU this test would wait for the device
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= weight.shape[0]:
            wrong = low if low < 0 else high
            raise ValueError(f"target {wrong} is outside the vocabulary 0..{weight.shape[0] - 1}")
