"""The error of a loss that is not finite, and how its batch is described."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def describe(inputs: Mapping[str, Any], shown: int = 8) -> str:
    """A batch in a few words: its question ids, or the shapes of its tensors."""
    ids: Iterable[Any] | None = inputs.get("ids")
    if ids:
        names = [str(identifier) for identifier in ids]
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        return f"the questions {', '.join(names[:shown])}{more}"
    shapes = [f"{name} {list(value.shape)}" for name, value in inputs.items() if isinstance(value, Tensor)]
    return ", ".join(shapes) or f"the fields {', '.join(inputs)}"


class NonFiniteLossError(RuntimeError):
    """The loss became nan or infinite.

    Attributes:
        step: The optimizer step (counted from 1) that was not made.
        ids: Ids of the questions in the batch, empty if the batch carries none.
    """

    def __init__(self, message: str, step: int, ids: tuple[str, ...] = ()):
        super().__init__(message)
        self.step = step
        self.ids = ids
