"""Log-probabilities of target tokens as a PyTorch op: checks, choice of backend, registration, gradients.

`torch.library` knows it as `ragkit::linear_logprob`, with a fake kernel, an autograd formula and an autocast rule, so
it works in `torch.compile(fullgraph=True)` and in mixed precision. Nothing waits for the GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from ragkit_kernels.linear_logprob import chunked, torch_rows
from ragkit_kernels.linear_logprob.reference import (
    check,
    check_options,
    check_positions,
    check_targets,
    scaling,
    token_logprobs_reference,
)
from ragkit_kernels.precision import accumulate
from ragkit_kernels.registration import no_second_derivative, register_autocast

BACKENDS = ("auto", "kernel", "chunked", "reference")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    positions: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of one target token per row, without ever holding all the logits.

    For a row with hidden state h and target t, over a vocabulary of V rows w_v (and biases b_v):

        a_v = (h·w_v + b_v) · logit_scale            the head (the factor is Granite's, Cohere's)
        z_v = softcap · tanh(a_v / softcap)          only with a soft-cap (Gemma 2, arXiv:2408.00118, section 2)
        log p(t | h) = z_t / temperature − log Σ_v exp(z_v / temperature)

    which is minus the token's cross-entropy. Logits exist a block at a time, and only for the rows that are asked for;
    in the backward pass each block is made again from the saved log-sum-exp. Cut Cross-Entropy (Wijmans et al. 2024,
    arXiv:2411.09009) and Liger-Kernel (Hsu et al. 2024, arXiv:2410.10989) do likewise; this one has neither locks nor
    atomics (the same bits in every run), keeps products of 16-bit numbers in float32 on their way into the log-sum-exp
    (where the GPU can: sm_80 and later), and filters no gradients.

    Args:
        hidden: [N, D] hidden states, any floating dtype and strides.
        weight: [V, D] the head's weight, dtype and device of `hidden` (under autocast any dtype).
        targets: [T] int64 token ids in 0..V-1, or `ignore_index`.
        positions: [T] int64, the rows of `hidden` that predict the targets. None: all rows, T = N.
        bias: [V] the head's bias, or None.
        logit_scale: Factor on the logits.
        softcap: Bound of the logits, > 0, or None.
        temperature: Divides the logits at last, > 0.
        ignore_index: A target of this value gives 0 and no gradient.
        chunk_rows: At most chunk_rows × V logits exist at once. None: 4 MiB of them on a CPU, 256 MiB on a GPU.
        backend: "auto": "kernel" for 16-bit tensors on GPUs from sm_80 on (D a multiple of 16), else "chunked".
            "kernel": product and log-sum-exp fused in Triton, no logits in memory at all; "chunked": library products
            and one pass over their rows (in Triton on a GPU); "reference": plain PyTorch with all logits, for any
            derivative. The gradient is chunked for both of the first.

    Returns:
        [T] log-probabilities in nats, float32 (float64 if the inputs are float64). NaN logits give NaN.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, options out of range; on a CPU also, before anything is
            computed, a target or position out of range. On a GPU, which is not waited for, such a target gives NaN
            (and a gradient of NaN), such a position PyTorch's device-side assertion.
        RuntimeError: backend="kernel" where there is none.

    Example:
        >>> hidden, weight = torch.randn(5, 8), torch.randn(100, 8)
        >>> token_logprobs(hidden, weight, torch.tensor([7, 99]), torch.tensor([3, 4])).shape
        torch.Size([2])
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; found {backend!r}")
    check(hidden, weight, targets, positions, bias)
    check_options(logit_scale, softcap, temperature, chunk_rows)
    if positions is not None:
        if positions.device.type == "cpu" and not torch.compiler.is_compiling():
            check_positions(positions, hidden.shape[0])
        # [N, D] -> [T, D]. Not hidden[positions], whose gradient on a GPU adds repeated rows in any order.
        hidden = torch.nn.functional.embedding(positions, hidden)
    if backend == "reference":
        if targets.device.type == "cpu" and not torch.compiler.is_compiling():
            check_targets(targets, weight.shape[0], ignore_index)
        return token_logprobs_reference(
            hidden, weight, targets, bias=bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature,
            ignore_index=ignore_index,
        )  # fmt: skip
    inner, outer = scaling(logit_scale, softcap, temperature)
    budget = 0 if chunk_rows is None else chunk_rows * weight.shape[0]
    return torch.ops.ragkit.linear_logprob(hidden, weight, targets, bias, inner, outer, ignore_index, budget, backend)[
        0
    ]


def _triton(x: Tensor) -> ModuleType | None:
    """The module of Triton kernels where they can serve this tensor."""
    if x.is_cuda and x.dtype != torch.float64 and _HAS_TRITON:
        return importlib.import_module("ragkit_kernels.linear_logprob.triton_backend")
    return None


def _fused(x: Tensor, backend: str) -> bool:
    """Whether the fused kernel runs; raises where it was asked for and cannot."""
    able = _triton(x) is not None and torch.cuda.get_device_capability(x.device)[0] >= 8
    if backend == "kernel" and not able:
        where = f"sm_{''.join(map(str, torch.cuda.get_device_capability(x.device)))}" if x.is_cuda else x.device.type
        raise RuntimeError(
            f"the fused kernel needs Triton, a GPU from sm_80 on and no float64; found {x.dtype} on {where}; "
            "use backend='chunked'"
        )
    fast = x.element_size() == 2 and x.shape[1] % 16 == 0  # else its loads are not asynchronous
    return able and (backend == "kernel" or (backend == "auto" and fast))


@torch.library.custom_op("ragkit::linear_logprob", mutates_args=())
def _logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    inner: float | None,
    outer: float,
    ignore_index: int,
    budget: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, log-sum-exp) [T]; the second is 0 for ignored rows on a CPU."""
    options = chunked.Options(inner, outer, ignore_index, budget)
    if _fused(hidden, backend):
        fused = importlib.import_module("ragkit_kernels.linear_logprob.triton_backend").fused_forward
        return fused(hidden, weight, targets, bias, options)
    rows = _triton(hidden) or torch_rows
    if hidden.device.type != "cpu":
        return chunked.forward(hidden, weight, targets, bias, options, rows)
    check_targets(targets, weight.shape[0], ignore_index)
    kept = _kept(targets, ignore_index)
    if kept is None:
        return chunked.forward(hidden, weight, targets, bias, options, rows)
    results = hidden.new_zeros(2, len(targets), dtype=accumulate(hidden))
    results[:, kept] = torch.stack(chunked.forward(hidden[kept], weight, targets[kept], bias, options, rows))
    return results[0].clone(), results[1].clone()


def _kept(targets: Tensor, ignore_index: int) -> Tensor | None:
    """Numbers of the rows that are not ignored; None if none is. On a CPU, where the others need no computing."""
    ignored = targets == ignore_index
    return (~ignored).nonzero().squeeze(1) if ignored.any() else None


@_logprob.register_fake
def _(hidden, weight, targets, bias, inner, outer, ignore_index, budget, backend):
    dtype = accumulate(hidden)
    return hidden.new_empty(hidden.shape[0], dtype=dtype), hidden.new_empty(hidden.shape[0], dtype=dtype)


@torch.library.custom_op("ragkit::linear_logprob_backward", mutates_args=())
def _gradients(
    grad: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    inner: float | None,
    outer: float,
    ignore_index: int,
    budget: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for one that is not needed."""
    options, rows = chunked.Options(inner, outer, ignore_index, budget), _triton(hidden) or torch_rows
    grad = grad.contiguous()
    kept = _kept(targets, ignore_index) if hidden.device.type == "cpu" else None
    if kept is None:
        return chunked.backward(grad, lse, hidden, weight, targets, bias, options, needs, rows)
    dhidden, dweight, dbias = chunked.backward(
        grad[kept], lse[kept], hidden[kept], weight, targets[kept], bias, options, needs, rows
    )
    if needs[0]:
        dhidden = hidden.new_zeros(hidden.shape).index_copy_(0, kept, dhidden)
    return dhidden, dweight, dbias


@_gradients.register_fake
def _(grad, lse, hidden, weight, targets, bias, inner, outer, ignore_index, budget, needs):
    return (
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(weight.shape[0] if needs[2] else 0, dtype=accumulate(weight) if bias is None else bias.dtype),
    )


_gradients.register_autograd(no_second_derivative)


def _setup(ctx, inputs, output):
    hidden, weight, targets, bias, *options, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], hidden, weight, targets, bias)
    ctx.options = options


def _backward(ctx, grad, _):
    lse, hidden, weight, targets, bias = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[3]]
    found = _gradients(grad, lse, hidden, weight, targets, bias, *ctx.options, needs)
    dhidden, dweight, dbias = (t if need else None for t, need in zip(found, needs, strict=True))
    return dhidden, dweight, None, dbias, None, None, None, None, None


_logprob.register_autograd(_backward, setup_context=_setup)

register_autocast("linear_logprob", floats=(0, 1))
register_autocast("linear_logprob_backward", floats=())
