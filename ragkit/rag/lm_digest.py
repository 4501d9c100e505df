"""A short name for the exact function that a language model computes: its weights, adapters and settings."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ragkit.rag.lm_head import core_of
from ragkit.rag.loading import digests

# Settings of a configuration that say where a model comes from or how it is run, not what it computes.
NOT_CONTENT = ("_name_or_path", "transformers_version", "architectures", "use_cache", "torch_dtype", "dtype")
BY_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_known: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def lm_digest(model: Any) -> str:
    """32 hexadecimal digits that change when anything changes that a log-probability depends on.

    The weights enter twice: a sample of each tensor's numbers (`loading.digests`) and the sum of all its bits as
    integers, which is exact, the same in any order, and as fast as reading them once. An adapter enters with its
    weights, its scaling and whether it is on.

    Repeated calls are cheap: the sum is made again only for a model whose tensors were replaced or written to, or
    whose samples differ.

    Args:
        model: A transformers model, or a `PeftModel` of one.
    """
    core = core_of(model)
    state = (
        sorted(digests(core).items()),
        [(name, id(t), t.data_ptr(), t._version, tuple(t.shape), str(t.dtype)) for name, t in _tensors(core)],
        _settings(core),
        _adapters(core),
    )
    known = _known.get(core)
    if known is None or known[0] != state:
        content = [state[0], [(name, *_bits(t)) for name, t in _tensors(core)], *state[2:]]
        known = (state, hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32])
        _known[core] = known
    return known[1]


def _tensors(core: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by name, tied ones once."""
    return [*core.named_parameters(), *core.named_buffers()]


@torch.no_grad()
def _bits(tensor: Tensor) -> tuple[str, list[int], int]:
    """dtype, shape and the sum of the numbers' bits read as integers (wrapping around in 64 bits)."""
    if tensor.is_meta:
        raise ValueError("a model whose weights are not in memory (device 'meta') cannot be told from others")
    plain = tensor.detach().contiguous().flatten()
    if tensor.is_complex():
        plain = torch.view_as_real(plain).flatten()
    whole = plain.view(BY_SIZE[plain.element_size()]).sum(dtype=torch.int64)
    return str(tensor.dtype), list(tensor.shape), int(whole)


def _settings(core: Any) -> str:
    """Class and configuration, without what does not change the numbers."""
    config = core.config.to_dict()
    kept = {key: value for key, value in config.items() if key not in NOT_CONTENT}
    return json.dumps([type(core).__name__, kept], sort_keys=True, default=str)


def _adapters(core: nn.Module) -> list[Any]:
    """Of each adapter layer: what is on, how strong, and what is merged into the weight already."""
    found = []
    for name, module in core.named_modules():
        active = getattr(module, "active_adapters", None)
        if not isinstance(active, list | tuple):  # of a transformers model it is a method
            continue
        scaling = getattr(module, "scaling", None)
        strengths = [str(scaling.get(a)) for a in active] if isinstance(scaling, dict) else []
        merged = [str(a) for a in getattr(module, "merged_adapters", [])]
        found.append([name, list(active), strengths, bool(getattr(module, "disable_adapters", False)), merged])
    return found
