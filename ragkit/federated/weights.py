"""Trained tensors on the way between server and clients: names and shapes are checked on both sides."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ragkit.federated.errors import FederatedError
from ragkit.optional import require


def to_record(tensors: Mapping[str, Tensor]) -> Any:
    """Tensors by name as Flower's `ArrayRecord`; numbers of 16 bits travel as float32, for NumPy knows no bfloat16."""
    app = require("flwr.app", extra="federated")
    half = (torch.bfloat16, torch.float16)
    plain = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    return app.ArrayRecord({name: t.float() if t.dtype in half else t for name, t in plain.items()})


def from_record(record: Any) -> dict[str, Tensor]:
    """The inverse of `to_record`: tensors by name, on the CPU."""
    return dict(record.to_torch_state_dict())


def load_weights(parameters: Mapping[str, nn.Parameter], given: Mapping[str, Tensor], where: str) -> bool:
    """Copies given tensors into the trained parameters.

    Args:
        parameters: What this side trains, by name.
        given: Tensors by the same names and of the same shapes.
        where: Who loads them, for the message ("client 2").

    Returns:
        Whether any value changed.

    Raises:
        FederatedError: A tensor is missing, unknown, or of another shape: the other side has another model or other
            settings. Nothing was copied then.
    """
    check_fit(parameters, given, where)
    changed = False
    with torch.no_grad():
        for name, parameter in parameters.items():
            tensor = given[name].to(parameter.device, parameter.dtype)
            if not torch.equal(parameter, tensor):
                parameter.copy_(tensor)
                changed = True
    return changed


def check_fit(parameters: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str) -> None:
    """Raises FederatedError where names or shapes differ, see `load_weights`."""
    unknown = [name for name in given if name not in parameters]
    missing = [name for name in parameters if name not in given]
    shapes = [name for name in parameters if name in given and parameters[name].shape != given[name].shape]
    if not (unknown or missing or shapes):
        return
    if shapes:
        name = shapes[0]
        found = f"{name!r} has the shape {list(given[name].shape)}, here it is {list(parameters[name].shape)}"
    elif missing:
        near = difflib.get_close_matches(missing[0], unknown, n=1)
        found = f"{missing[0]!r} is missing" + (f" (there is {near[0]!r})" if near else "")
    else:
        found = f"{unknown[0]!r} is not trained here"
    raise FederatedError(
        f"{where}: the received weights are those of another model: {found}. {len(unknown)} tensors are unknown, "
        f"{len(missing)} missing, {len(shapes)} of another shape; server and clients need the same model, the same "
        "trained part and the same adapter settings"
    )


def size_in_bytes(content: Any) -> int:
    """What the records of a message weigh."""
    return sum(record.count_bytes() for record in content.values())
