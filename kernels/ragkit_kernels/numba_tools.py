"""What the numba backends share: compiling with a cache, launching on PyTorch's threads, flat views of tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

_LOCK = threading.Lock()  # numba's fallback threading layer must not be entered from two Python threads


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`numba.njit` with a disk cache (where a writable place for it exists) and fused multiply-add."""
    if function is None:
        return lambda f: kernel(f, **options)
    settings = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy", **options}
    try:
        return numba.njit(cache=True, **settings)(function)
    except RuntimeError:  # no writable cache folder: compiled anew in every process
        return numba.njit(**settings)(function)


def launch(function: Callable[..., Any], *arguments: Any) -> None:
    """Runs a kernel on as many threads as PyTorch uses."""
    with _LOCK:
        most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        threads = torch.get_num_threads()
        numba.set_num_threads(max(1, min(threads, most)))
        function(*arguments)
        # Where both use one OpenMP, numba's start sets its number of threads for PyTorch too, also where that was
        # set to 1 because the machine is busy; steps were seven times slower for it.
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def flat(tensor: Tensor) -> np.ndarray:
    """A 1-D view of the memory that a strided tensor spans, from its first element to its last; nothing is copied."""
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return np.empty(1, dtype=tensor.new_empty(0).numpy().dtype)
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,)).numpy()


def optional(tensor: Tensor | None, like: Tensor | torch.dtype) -> np.ndarray:
    """A flat view, or a filler of the type of `like`, for an argument that is not there."""
    dtype = like if isinstance(like, torch.dtype) else like.dtype
    return torch.zeros(1, dtype=dtype).numpy() if tensor is None else flat(tensor)
