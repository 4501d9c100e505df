"""Which backend runs an op: Triton on a GPU, numba on a CPU, plain PyTorch elsewhere or where these are missing."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType

import torch

BACKENDS = ("auto", "kernel", "reference")


_WANTED = {"cuda": "triton", "cpu": "numba"}
_FOUND = {device: name if importlib.util.find_spec(name) else None for device, name in _WANTED.items()}
_WARNED: set[str] = set()


def available(device_type: str) -> str | None:
    """Name of the compiled backend for tensors on this kind of device ("triton", "numba"), or None."""
    found = _FOUND.get(device_type)
    if found is None and device_type in _WANTED and device_type not in _WARNED:
        _WARNED.add(device_type)
        name = _WANTED[device_type]
        warnings.warn(
            f"{name} is not installed: the graph kernels run in plain PyTorch on the {device_type}, many times "
            f"slower and with far more memory; install it with: pip install {name}",
            stacklevel=3,
        )
    return found


def use_kernel(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether an op on this device runs in its compiled kernel.

    Args:
        device, dtype: Of the op's main tensor; there is no GPU kernel for float64.
        backend: "auto": the kernel where there is one; "kernel": the kernel, or an error; "reference": plain PyTorch.

    Raises:
        ValueError: An unknown name.
        RuntimeError: "kernel" was asked for and there is none for this device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; found {backend!r}")
    if backend == "reference":
        return False
    found = available(device.type) is not None and not (device.type == "cuda" and dtype == torch.float64)
    if backend == "kernel" and not found:
        raise RuntimeError(f"there is no kernel for {dtype} on {device.type}; use backend='reference'")
    return found


def module(device: torch.device) -> ModuleType:
    """The module that launches the kernels for this device."""
    name = "triton_backend" if device.type == "cuda" else "cpu_backend"
    return importlib.import_module(f"ragkit_kernels.relational_conv.{name}")
