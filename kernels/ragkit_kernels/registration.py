"""What ops share when they are registered with PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def no_second_derivative(ctx, *grads):
    """Autograd formula of a backward op: a sentence instead of a wrong gradient."""
    raise RuntimeError("the fused kernels have no second derivative; use backend='reference' for it")


def _narrows(a: object) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64


def register_autocast(name: str, floats: tuple[int, ...]) -> None:
    """Under autocast, the arguments at these places (tensors or None) are cast to its dtype, but for float64 ones."""

    def rule(device_type: str):
        def cast(*args):
            dtype = torch.get_autocast_dtype(device_type)
            cast_args = [a.to(dtype) if i in floats and _narrows(a) else a for i, a in enumerate(args)]
            with torch.autocast(device_type, enabled=False):
                return getattr(torch.ops.ragkit, name)(*cast_args)

        return cast

    for device_type in ("cuda", "cpu"):
        torch.library.impl(f"ragkit::{name}", f"Autocast{device_type.upper()}")(rule(device_type))
