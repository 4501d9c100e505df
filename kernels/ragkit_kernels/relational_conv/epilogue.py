"""What follows a layer's matrix product, fused: LayerNorm + ReLU + residual, and the head's ReLU + dot."""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit_kernels.registration import no_second_derivative
from ragkit_kernels.relational_conv import backends
from ragkit_kernels.relational_conv.op import unit_stride
from ragkit_kernels.relational_conv.reference import norm_relu_residual_reference, relu_dot_reference

NARROW = (torch.float16, torch.bfloat16)


def check_norm(weight: Tensor | None, bias: Tensor | None, D: int) -> None:
    """Raises ValueError unless both are [D], or neither is there."""
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias of the LayerNorm come together")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tuple(tensor.shape) != (D,):
            raise ValueError(f"{name} of the LayerNorm must be [{D}], found {list(tensor.shape)}")


def norm_relu_residual(
    h: Tensor,
    x: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """relu(LayerNorm(h)) + x in one pass over the rows, statistics in float32.

    Args:
        h: [N, B, D] contiguous.
        x: [N, B, D] residual with a contiguous last dimension, or None.
        weight, bias: [D] of the LayerNorm; None: no LayerNorm.
        eps: Added to the variance.
        backend: As in `relational_conv`.

    Returns:
        [N, B, D], dtype of `h`; gradients for all four tensors.
    """
    if h.ndim != 3 or (x is not None and x.shape != h.shape):
        raise ValueError(
            f"h and x must both be [N, B, D], found {list(h.shape)}, {None if x is None else list(x.shape)}"
        )
    check_norm(weight, bias, h.shape[-1])
    if x is not None and (x.dtype != h.dtype or (x.shape[-1] > 1 and x.stride(-1) != 1)):
        raise ValueError(f"x must be {h.dtype} with a contiguous last dimension, found {x.dtype} {x.stride()}")
    if not backends.use_kernel(backend, h.device, h.dtype):
        return norm_relu_residual_reference(h, x, weight, bias, eps)
    return torch.ops.ragkit.norm_relu_residual(h, x, weight, bias, eps)


@torch.library.custom_op("ragkit::norm_relu_residual", mutates_args=())
def _norm(h: Tensor, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    out = h.new_empty(h.shape)
    norm_into(out, h, x, weight, bias, eps)
    return out


def norm_into(
    out: Tensor, h: Tensor, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    """Runs the backend's kernel into `out` [N, B, D] (any strides with a contiguous last dimension)."""
    backend = backends.module(h.device)
    h = h.contiguous()
    if h.device.type == "cpu" and h.dtype in NARROW:  # numba has no 16-bit floats
        wide = torch.empty(out.shape)
        backend.norm_forward(h.float(), *(None if t is None else t.float() for t in (x, weight, bias)), eps, wide)
        out.copy_(wide)
        return
    if h.device.type == "cpu" and weight is not None and bias is not None:
        weight, bias = weight.to(h.dtype), bias.to(h.dtype)
    backend.norm_forward(h, x, weight, bias, eps, out)


@_norm.register_fake
def _(h, x, weight, bias, eps):
    return torch.empty_like(h, memory_format=torch.contiguous_format)


@torch.library.custom_op("ragkit::norm_relu_residual_backward", mutates_args=())
def norm_backward(
    grad: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, weight and bias (the last two are zeros without LayerNorm)."""
    backend = backends.module(h.device)
    h = h.contiguous()
    dtype, kind = h.dtype, torch.float32 if weight is None else weight.dtype
    if h.device.type == "cpu":
        wide = torch.float32 if dtype in NARROW else dtype
        grad, h = grad.to(wide), h.to(wide)
        weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    dh, dweight, dbias = backend.norm_backward(grad, h, weight, bias, eps)
    return dh.to(dtype), dweight.to(kind), dbias.to(kind)


@norm_backward.register_fake
def _(grad, h, weight, bias, eps):
    kind = torch.float32 if weight is None else weight.dtype
    D = h.shape[-1]
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    return dh, h.new_empty(D, dtype=kind), h.new_empty(D, dtype=kind)


norm_backward.register_autograd(no_second_derivative)


def _norm_setup(ctx, inputs, output):
    h, x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(h, weight, bias)


def _norm_grad(ctx, grad):
    h, weight, bias = ctx.saved_tensors
    grad = unit_stride(grad)
    needs = ctx.needs_input_grad
    if not (needs[0] or needs[2] or needs[3]):
        return None, grad, None, None, None
    dh, dweight, dbias = norm_backward(grad, h, weight, bias, ctx.eps)
    return dh, grad if needs[1] else None, dweight if needs[2] else None, dbias if needs[3] else None, None


_norm.register_autograd(_norm_grad, setup_context=_norm_setup)


def relu_dot(h: Tensor, c: Tensor, w: Tensor, backend: str = "auto") -> Tensor:
    """The scoring head after its matrix product: Σ_j relu(h[n, b, j] + c[b, j]) w[j], nothing concatenated or stored.

    With mlp([x ; q]) = w2 · relu(W_x x + W_q q + b), `h` is W_x x and `c` is W_q q + b, once per query.

    Args:
        h: [N, B, H], contiguous in H; or [N, 1, H], shared by the queries.
        c: [B, H].
        w: [H].
        backend: As in `relational_conv`.

    Returns:
        [N, B] scores, float32 (float64 for float64).
    """
    fits = h.ndim == 3 and c.ndim == 2 and h.shape[1] in (1, len(c)) and h.shape[2] == c.shape[1]
    if not fits or w.shape != h.shape[2:]:
        raise ValueError(
            f"h must be [N, B or 1, H], c [B, H], w [H]; found {list(h.shape)}, {list(c.shape)}, {list(w.shape)}"
        )
    if not backends.use_kernel(backend, h.device, h.dtype):
        return relu_dot_reference(h, c, w)
    return torch.ops.ragkit.relu_dot(h, c, w)


@torch.library.custom_op("ragkit::relu_dot", mutates_args=())
def _dot(h: Tensor, c: Tensor, w: Tensor) -> Tensor:
    return backends.module(h.device).dot_forward(*_same(h, c, w))


def _same(h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One dtype for all three; on the CPU at least float32."""
    wide = torch.float32 if h.device.type == "cpu" and h.dtype in NARROW else h.dtype
    small = torch.float64 if wide == torch.float64 else torch.float32
    return unit_stride(h.to(wide)), c.to(small).contiguous(), w.to(small).contiguous()


@_dot.register_fake
def _(h, c, w):
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    return h.new_empty(h.shape[0], c.shape[0], dtype=dtype)


@torch.library.custom_op("ragkit::relu_dot_backward", mutates_args=())
def _dot_backward(grad: Tensor, h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dh, dc, dw = backends.module(h.device).dot_backward(grad.contiguous(), *_same(h, c, w))
    return dh.to(h.dtype), dc.to(c.dtype), dw.to(w.dtype)


@_dot_backward.register_fake
def _(grad, h, c, w):
    return h.new_empty(h.shape), torch.empty_like(c), torch.empty_like(w)


_dot_backward.register_autograd(no_second_derivative)


def _dot_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _dot_grad(ctx, grad):
    return _dot_backward(grad, *ctx.saved_tensors)


_dot.register_autograd(_dot_grad, setup_context=_dot_setup)
