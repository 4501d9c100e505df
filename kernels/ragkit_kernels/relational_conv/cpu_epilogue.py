"""numba backend of what follows the matrix products: LayerNorm + ReLU + residual, and the scoring head's ReLU + dot.

Each row is read once. Gradients of shared vectors (LayerNorm weight and bias, head weight) are summed per block of
rows and then over the blocks in order, so they do not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from ragkit_kernels.numba_tools import flat, kernel, launch, optional

ROWS = 256  # rows per block of the partial sums
REDUCE = {"contract", "reassoc"}  # lets sums over a row use vector registers


@kernel(fastmath=REDUCE)
def _statistics(row, eps):
    """Mean and 1 / sqrt(variance + eps) of a row."""
    D = len(row)
    total = row.dtype.type(0)
    for d in range(D):
        total += row[d]
    mean = total / row.dtype.type(D)
    square = row.dtype.type(0)
    for d in range(D):
        c = row[d] - mean
        square += c * c
    return mean, row.dtype.type(1) / np.sqrt(square / row.dtype.type(D) + row.dtype.type(eps))


@kernel(parallel=True)
def _norm_kernel(h, x, sxn, sxb, has_x, in_place, weight, bias, norm, eps, out, son, sob, N, B, D):
    zero, one = h.dtype.type(0), h.dtype.type(1)
    for n in prange(N):
        for b in range(B):
            at = (np.int64(n) * B + b) * D
            i = np.int64(n) * sxn + b * sxb
            o = np.int64(n) * son + b * sob
            hs, ys = h[at : at + D], out[o : o + D]
            mean, scale = _statistics(hs, eps) if norm else (zero, one)
            if not in_place:  # else y takes the place of x, to which it is added
                for d in range(D):
                    ys[d] = zero
            if norm:
                for d in range(D):
                    ys[d] += max((hs[d] - mean) * scale * weight[d] + bias[d], zero)
            else:
                for d in range(D):
                    ys[d] += max(hs[d], zero)
            if has_x and not in_place:
                xs = x[i : i + D]
                for d in range(D):
                    ys[d] += xs[d]


@kernel(parallel=True, fastmath=REDUCE)
def _norm_backward_kernel(g, sgn, sgb, h, weight, bias, norm, eps, dh, dweight, dbias, M, B, D):
    zero = h.dtype.type(0)
    for block in prange((M + ROWS - 1) // ROWS):
        for d in range(D):
            dweight[block, d] = 0
            dbias[block, d] = 0
        for m in range(block * ROWS, min(M, (block + 1) * ROWS)):
            at = np.int64(m) * D
            i = np.int64(m // B) * sgn + (m % B) * sgb
            hs, gs, ds = h[at : at + D], g[i : i + D], dh[at : at + D]
            dws, dbs = dweight[block], dbias[block]
            if not norm:
                for d in range(D):
                    ds[d] = gs[d] if hs[d] > zero else zero
                continue
            mean, scale = _statistics(hs, eps)
            first = zero  # Σ of the gradient of the normalised row, and Σ of it times the row
            second = zero
            for d in range(D):
                y = (hs[d] - mean) * scale
                v = gs[d] if y * weight[d] + bias[d] > zero else zero
                dws[d] += v * y
                dbs[d] += v
                first += v * weight[d]
                second += v * weight[d] * y
            first /= h.dtype.type(D)
            second /= h.dtype.type(D)
            for d in range(D):
                y = (hs[d] - mean) * scale
                v = gs[d] if y * weight[d] + bias[d] > zero else zero
                ds[d] = scale * (v * weight[d] - first - y * second)


def norm_forward(
    h: Tensor, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor
) -> None:
    """out [N, B, D] (strided) = relu(LayerNorm(h)) + x, for contiguous h; without weight there is no LayerNorm.

    `x` may be `out` itself.
    """
    N, B, D = h.shape
    sxn, sxb = (0, 0) if x is None else (x.stride(0), x.stride(1))
    launch(
        _norm_kernel, flat(h), optional(x, h), sxn, sxb, x is not None, x is out,
        optional(weight, h), optional(bias, h), weight is not None, eps,
        flat(out), out.stride(0), out.stride(1), N, B, D,
    )  # fmt: skip


def norm_backward(
    grad: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dh [N, B, D], dweight [D], dbias [D]) for grad [N, B, D]; the last two are 0 without LayerNorm."""
    N, B, D = h.shape
    dh = h.new_empty(h.shape)
    blocks = (N * B + ROWS - 1) // ROWS
    dweight, dbias = h.new_empty(blocks, D), h.new_empty(blocks, D)
    launch(
        _norm_backward_kernel, flat(grad), grad.stride(0), grad.stride(1), flat(h), optional(weight, h),
        optional(bias, h), weight is not None, eps, flat(dh), dweight.numpy(), dbias.numpy(), N * B, B, D,
    )  # fmt: skip
    return dh, dweight.sum(0), dbias.sum(0)


@kernel(parallel=True, fastmath=REDUCE)
def _dot_kernel(h, shn, shb, c, w, out, N, B, H):
    zero = h.dtype.type(0)
    for n in prange(N):
        for b in range(B):
            i = np.int64(n) * shn + b * shb
            hs, cs = h[i : i + H], c[b]
            total = zero
            for j in range(H):
                total += max(hs[j] + cs[j], zero) * w[j]
            out[n, b] = total


@kernel(parallel=True)
def _dot_backward_kernel(g, h, shn, shb, c, w, dh, sdn, sdb, dc, dw, N, B, H):
    zero = h.dtype.type(0)
    for block in prange((N + ROWS - 1) // ROWS):
        for j in range(H):
            dw[block, j] = 0
        for b in range(B):
            for j in range(H):
                dc[block, b, j] = 0
        for n in range(block * ROWS, min(N, (block + 1) * ROWS)):
            for b in range(B):
                i = np.int64(n) * shn + b * shb
                o = np.int64(n) * sdn + b * sdb
                v = g[n, b]
                hs, ds, cs, dcs, dws = h[i : i + H], dh[o : o + H], c[b], dc[block, b], dw[block]
                if b == 0 or sdb > 0:  # a row that the queries share sums over them
                    for j in range(H):
                        ds[j] = zero
                for j in range(H):
                    y = hs[j] + cs[j]
                    u = v if y > zero else zero
                    dws[j] += u * y
                    u *= w[j]
                    ds[j] += u
                    dcs[j] += u


def _strides(h: Tensor) -> tuple[int, int]:
    """Strides per node and per query; 0 per query where all share a row."""
    return h.stride(0), 0 if h.shape[1] == 1 else h.stride(1)


def dot_forward(h: Tensor, c: Tensor, w: Tensor) -> Tensor:
    """[N, B] = Σ_j relu(h[n, b, j] + c[b, j]) w[j] for h [N, B, H], or [N, 1, H] shared by the queries."""
    N, (B, H) = len(h), c.shape
    out = h.new_empty(N, B)
    launch(_dot_kernel, flat(h), *_strides(h), c.numpy(), w.numpy(), out.numpy(), N, B, H)
    return out


def dot_backward(grad: Tensor, h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dh in the shape of h, dc [B, H], dw [H]) for grad [N, B]."""
    N, (B, H) = len(h), c.shape
    blocks = (N + ROWS - 1) // ROWS
    dh, dc, dw = h.new_empty(h.shape), h.new_empty(blocks, B, H), h.new_empty(blocks, H)
    launch(
        _dot_backward_kernel, grad.numpy(), flat(h), *_strides(h), c.numpy(), w.numpy(), flat(dh), *_strides(dh),
        dc.numpy(), dw.numpy(), N, B, H,
    )  # fmt: skip
    return dh, dc.sum(0), dw.sum(0)
