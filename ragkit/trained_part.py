"""Which part of a model is trained, and a wrapper that saves only that part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ragkit.runs import RunError


def freeze(module: nn.Module) -> nn.Module:
    """Takes every parameter of `module` out of training (`requires_grad`) and turns dropout off (`eval`)."""
    module.requires_grad_(False)
    return module.eval()


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


class TrainedPart(nn.Module):
    """Wraps a model that is not from transformers so that checkpoints hold just its trained tensors.

    The Trainer writes `state_dict()` of such a model as safetensors, which refuses tensors that share memory, and a
    checkpoint need not repeat the frozen part. Attributes of the wrapped module can be reached through the wrapper.
    Buffers are saved too (running statistics change while training).
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Trained parameters and buffers by name, each shared tensor once."""
        return {name: tensor.detach().contiguous() for name, tensor in self._saved_tensors().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copies the tensors of a checkpoint back.

        Raises:
            RunError: The checkpoint lacks a trained tensor, or has one of another name or shape.
        """
        own = self._saved_tensors()
        wrong = sorted(own.keys() ^ state_dict.keys())
        wrong += [name for name in own.keys() & state_dict.keys() if own[name].shape != state_dict[name].shape]
        if wrong:
            raise RunError(
                f"the checkpoint does not fit the model: {len(wrong)} tensors are missing, unknown or of another "
                f"shape, for example {wrong[0]!r}; it was made with other settings "
                "(which part is trained, which encoder)"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])

    def _saved_tensors(self) -> dict[str, Tensor]:
        # named_parameters and named_buffers name a shared tensor once; the first name stands for all.
        tensors: dict[str, Tensor] = dict(trainable_parameters(self.module))
        buffers = {name: buffer for name, buffer in self.module.named_buffers() if buffer is not None}
        saved = super().state_dict().keys()  # leaves out buffers that are not persistent
        tensors.update({name: buffer for name, buffer in buffers.items() if f"module.{name}" in saved})
        return tensors
