"""Low-rank adapters (LoRA) on a generator, through PEFT."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

from ragkit.config import ConfigError, RALTConfig


def is_peft_model(model: nn.Module) -> bool:
    """Whether the model is a PEFT model, that is, carries an adapter."""
    from peft import PeftModel  # slow to import, and only trainings need it

    return isinstance(model, PeftModel)


def add_adapter(model: Any, config: RALTConfig) -> Any:
    """A PEFT model around `model` with a new LoRA adapter, which does nothing until it is trained.

    W x becomes W x + (alpha / r) B A x, with A random (seeded by `config.train.seed`) and B zero (Hu et al. 2021,
    arXiv:2106.09685); with method="dora" the sum's rows get trained lengths (Liu et al. 2024, arXiv:2402.09353), with
    `lora_rslora` alpha is divided by sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732). A model that carries an adapter
    already keeps it: it is trained on, with its own rank.

    Raises:
        ConfigError: A name in `lora_targets` is not that of a linear layer, or method="dora" on a model with an
            adapter of another kind.
    """
    from peft import LoraConfig, get_peft_model

    if is_peft_model(model):
        active = [model.peft_config[name] for name in model.active_adapters]
        if config.method == "dora" and not all(getattr(each, "use_dora", False) for each in active):
            raise ConfigError(
                'method: found "dora", but the generator carries an adapter without it; use method="lora" to train '
                "that on, or merge it first: generator.model = generator.model.merge_and_unload()"
            )
        return model
    linear = sorted({name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)})
    for target in config.lora_targets or []:
        if target.rsplit(".", 1)[-1] not in linear:
            near = difflib.get_close_matches(target, linear, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(
                f"lora_targets: no linear layer is called {target!r}{hint}; there are {', '.join(linear)}"
            )
    torch.manual_seed(config.train.seed)
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_r,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT divides by r: a float is as good
            lora_dropout=config.lora_dropout,
            use_dora=config.method == "dora",
            use_rslora=config.lora_rslora,
            target_modules=config.lora_targets or "all-linear",  # all of them but the output layer
        ),
    )


def adapter_parameters(model: Any) -> list[nn.Parameter]:
    """The parameters of the active adapter."""
    prefix = getattr(model.base_model, "prefix", "lora_")  # how this kind of adapter names its parameters
    active = [f".{name}" for name in model.active_adapters]
    return [p for name, p in model.named_parameters() if prefix in name and any(a in name for a in active)]
