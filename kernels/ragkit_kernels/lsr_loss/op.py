"""The LSR loss as PyTorch ops: checks, registration, gradients.

`torch.library` knows them as `ragkit::lsr_loss` and `ragkit::lsr_loss_from_embeddings`, with fake kernels, autograd
formulas and autocast rules, so they work in `torch.compile(fullgraph=True)` and in mixed precision. The gradient with
respect to the scores is computed beside the loss, in the same pass; the backward pass multiplies. Nothing waits for
the GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from ragkit_kernels.lsr_loss import torch_backend
from ragkit_kernels.lsr_loss.reference import (
    check,
    check_embeddings,
    check_options,
    lsr_loss_from_embeddings_reference,
    lsr_loss_reference,
    reduce,
)
from ragkit_kernels.precision import accumulate
from ragkit_kernels.registration import no_second_derivative, register_autocast

BACKENDS = ("auto", "kernel", "reference")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def lsr_loss(
    scores: Tensor,
    lm_scores: Tensor,
    gamma: float,
    beta: float,
    direction: str = "KL(P_R||Q_LM)",
    mask: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """KL divergence between what the retriever prefers and what the language model finds useful.

    For each question (a row), over its K passages::

        P_R(d)  = softmax_d(scores / gamma)       the retriever's distribution; the gradient goes here only
        Q_LM(d) = softmax_d(lm_scores / beta)     the teacher's; `lm_scores` is detached

        KL(P_R||Q_LM) = Σ_d P_R(d) [log P_R(d) − log Q_LM(d)]     REPLUG LSR (Shi et al. 2023, arXiv:2301.12652,
                                                                   section 4), RA-DIT (Lin et al. 2023,
                                                                   arXiv:2310.01352, section 2.3): seeks the mode
        KL(Q_LM||P_R) = Σ_d Q_LM(d) [log Q_LM(d) − log P_R(d)]     the cross-entropy direction: covers the mass

    | input     | shape  | meaning                                                         |
    |-----------|--------|-----------------------------------------------------------------|
    | scores    | [B, K] | similarity s(q, d) of each passage, with gradient               |
    | lm_scores | [B, K] | log p_LM(y | d, q) in nats, or its mean per token; never exp'd  |
    | mask      | [B, K] | True where there is a passage                                   |

    Recommendation: cosine scores lie in [-1, 1], so gamma must be small (0.05 to 0.1) or P_R is nearly flat; with the
    mean log-probability per token, beta = 1 leaves the teacher as sharp as the LM is.

    Args:
        scores: [B, K] retrieval scores. Any floating dtype and strides; computed in float32 (float64 stays).
        lm_scores: [B, K] the teacher's scores in nats.
        gamma: Temperature of the retriever, > 0.
        beta: Temperature of the teacher, > 0.
        direction: One of `DIRECTIONS`; named as it is computed.
        mask: [B, K] bool, None: all true. A masked entry has probability exactly 0 on both sides, whatever stands in
            the inputs there (NaN and infinities included). A row without any passage gives 0.
        reduction: "mean" over the B rows, "sum", or "none" for [B].
        backend: "auto": Triton on a GPU, fused PyTorch elsewhere, both with the gradient computed beside the loss;
            "kernel": the same; "reference": plain PyTorch, which also has a second derivative.

    Returns:
        A scalar, or [B] for "none"; nats, float32 (float64 for float64 scores).

    Raises:
        ValueError: Shapes or devices that differ, a temperature that is not positive, an unknown direction, reduction
            or backend.

    Example:
        >>> scores = torch.tensor([[0.6, 0.5, 0.1]], requires_grad=True)
        >>> loss = lsr_loss(scores, torch.tensor([[-4.0, -0.5, -3.0]]), gamma=0.1, beta=1.0)
        >>> loss.backward()
        >>> bool(scores.grad[0, 1] < 0)  # the score of the passage that helps the LM most is to rise
        True
    """
    check(scores, lm_scores, mask, gamma, beta, direction, reduction)
    if not _use_kernel(backend):
        return lsr_loss_reference(scores, lm_scores, gamma, beta, direction, mask, reduction)
    losses, _ = torch.ops.ragkit.lsr_loss(scores, lm_scores.detach(), mask, gamma, beta, direction)
    return reduce(losses, reduction)


def lsr_loss_from_embeddings(
    queries: Tensor,
    passages: Tensor,
    lm_scores: Tensor,
    gamma: float,
    beta: float,
    direction: str = "KL(P_R||Q_LM)",
    mask: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """`lsr_loss` of the scores queries · passages, with gradients for both encoders; the scores are not kept.

    | input     | shape                | meaning                                                           |
    |-----------|----------------------|-------------------------------------------------------------------|
    | queries   | [B, D]               | embeddings of the questions, with gradient                        |
    | passages  | [B, K, D], or [C, D] | each question's own passages, or candidates that all share (K = C) |
    | lm_scores | [B, K]               | log p_LM(y | d, q) in nats, or its mean per token                  |
    | mask      | [B, K]               | True where there is a passage                                     |

    Shared candidates take one matrix product each way; what stands behind the mask takes no part, NaN included.
    Products of 16-bit embeddings are summed and kept in float32: a score in bfloat16 would be off by up to 1/512 of
    its size, which divided by a gamma of 0.05 is a tenth of a nat and more.

    Args:
        queries: [B, D]; normalised ones give cosines.
        passages: [B, K, D] or [C, D], dtype of `queries` (under autocast any).
        lm_scores, gamma, beta, direction, mask, reduction, backend: As in `lsr_loss`.

    Returns:
        A scalar, or [B] for "none"; nats, float32 (float64 for float64 embeddings).

    Raises:
        ValueError: As in `lsr_loss`; the message names the argument.

    Example:
        >>> queries, passages = torch.randn(2, 8, requires_grad=True), torch.randn(2, 4, 8)
        >>> lsr_loss_from_embeddings(queries, passages, torch.randn(2, 4), gamma=1.0, beta=1.0).backward()
        >>> queries.grad.shape
        torch.Size([2, 8])
    """
    check_embeddings(queries, passages, lm_scores, mask)
    check_options(gamma, beta, direction, reduction)
    if not _use_kernel(backend):
        options = (gamma, beta, direction, mask, reduction)
        return lsr_loss_from_embeddings_reference(queries, passages, lm_scores, *options)
    losses, _ = torch.ops.ragkit.lsr_loss_from_embeddings(
        queries, passages, lm_scores.detach(), mask, gamma, beta, direction
    )
    return reduce(losses, reduction)


def _use_kernel(backend: str) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; found {backend!r}")
    return backend != "reference"


def _module(x: Tensor) -> ModuleType:
    """Triton for a GPU's tensors, but for float64 ones; else PyTorch."""
    if x.is_cuda and x.dtype != torch.float64 and _HAS_TRITON:
        return importlib.import_module("ragkit_kernels.lsr_loss.triton_backend")
    return torch_backend


@torch.library.custom_op("ragkit::lsr_loss", mutates_args=())
def _loss(
    scores: Tensor, lm_scores: Tensor, mask: Tensor | None, gamma: float, beta: float, direction: str
) -> tuple[Tensor, Tensor]:
    """losses [B] and their gradient [B, K]."""
    return _module(scores).loss_forward(scores, lm_scores, mask, gamma, beta, direction)


@_loss.register_fake
def _(scores, lm_scores, mask, gamma, beta, direction):
    return _outputs(scores, lm_scores)


def _outputs(x: Tensor, lm_scores: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulate(x)
    return x.new_empty(lm_scores.shape[0], dtype=dtype), x.new_empty(lm_scores.shape, dtype=dtype)


@torch.library.custom_op("ragkit::lsr_loss_backward", mutates_args=())
def _loss_backward(grad: Tensor, dscores: Tensor, losses: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, K] grad · dscores in the scores' dtype. `losses` is there for its graph: it has no second derivative."""
    return torch.mul(grad.unsqueeze(-1), dscores, out=dscores.new_empty(dscores.shape, dtype=dtype))


@_loss_backward.register_fake
def _(grad, dscores, losses, dtype):
    return dscores.new_empty(dscores.shape, dtype=dtype)


_loss_backward.register_autograd(no_second_derivative)


def _setup(ctx, inputs, output):
    losses, dscores = output
    ctx.mark_non_differentiable(dscores)
    ctx.save_for_backward(losses, dscores)
    ctx.dtype = inputs[0].dtype


def _backward(ctx, grad, _):
    losses, dscores = ctx.saved_tensors
    return _loss_backward(grad, dscores, losses, ctx.dtype), None, None, None, None, None


_loss.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("ragkit::lsr_loss_from_embeddings", mutates_args=())
def _embeddings(
    queries: Tensor,
    passages: Tensor,
    lm_scores: Tensor,
    mask: Tensor | None,
    gamma: float,
    beta: float,
    direction: str,
) -> tuple[Tensor, Tensor]:
    """losses [B] and their gradient with respect to the scores [B, K]."""
    return _module(queries).embeddings_forward(queries, passages, lm_scores, mask, gamma, beta, direction)


@_embeddings.register_fake
def _(queries, passages, lm_scores, mask, gamma, beta, direction):
    return _outputs(queries, lm_scores)


@torch.library.custom_op("ragkit::lsr_loss_from_embeddings_backward", mutates_args=())
def _embeddings_backward(
    grad: Tensor, dscores: Tensor, queries: Tensor, passages: Tensor, masked: bool, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and passages; an empty tensor for one that is not needed."""
    return _module(queries).embeddings_backward(grad, dscores, queries, passages, masked, needs)


@_embeddings_backward.register_fake
def _(grad, dscores, queries, passages, masked, needs):
    return (
        queries.new_empty(queries.shape if needs[0] else 0),
        passages.new_empty(passages.shape if needs[1] else 0),
    )


_embeddings_backward.register_autograd(no_second_derivative)


def _embeddings_setup(ctx, inputs, output):
    queries, passages, _, mask, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], queries, passages)
    ctx.masked = mask is not None


def _embeddings_grads(ctx, grad, _):
    needs = list(ctx.needs_input_grad[:2])
    dscores, queries, passages = ctx.saved_tensors
    dqueries, dpassages = _embeddings_backward(grad, dscores, queries, passages, ctx.masked, needs)
    return dqueries if needs[0] else None, dpassages if needs[1] else None, None, None, None, None, None


_embeddings.register_autograd(_embeddings_grads, setup_context=_embeddings_setup)


register_autocast("lsr_loss", floats=())
register_autocast("lsr_loss_backward", floats=())
register_autocast("lsr_loss_from_embeddings", floats=(0, 1))
register_autocast("lsr_loss_from_embeddings_backward", floats=())
