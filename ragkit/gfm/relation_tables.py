"""The relation tables of all layers: once per layer instead of once per query, and kept while nothing changes.

They are 43 % of GFM-RAG v1's work for a question, though no question enters them: they depend on the weights and on
the relation embeddings alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ragkit.gfm.graph_view import Stamp
from ragkit.gfm.layers import RelationalLayer


class RelationTables(NamedTuple):
    """Attributes:
    base: [R, D] rel_mlp(rel_emb).
    layers: For each layer [R, D] relation_projection(base).
    """

    base: Tensor
    layers: list[Tensor]


def compute_tables(rel_mlp: nn.Module, layers: Iterable[RelationalLayer], rel_emb: Tensor) -> RelationTables:
    """P_l = relation_projection_l(rel_mlp(rel_emb)).

    Args:
        rel_mlp: [R, F] -> [R, D].
        layers: L layers.
        rel_emb: [R, F], on the device of the weights and with their dtype.
    """
    base = rel_mlp(rel_emb)
    return RelationTables(base, [layer.relation_projection(base) for layer in layers])


class KeptValue:
    """A value and the tensors that it was made from. It is made anew when one of them was changed in place, replaced
    or moved, and under another autocast.

    A change through `parameter.data` is not counted by PyTorch; the model calls `clear` when its mode is set, since
    training may have done that.
    """

    def __init__(self) -> None:
        # One attribute, read and set at once: two threads may use one model.
        self._kept: tuple[list[Stamp], tuple[bool, torch.dtype], Any] | None = None

    def get(self, tensors: list[Tensor]) -> Any:
        """The value, if it was made from these tensors and none has changed."""
        kept = self._kept
        if kept is None or kept[1] != _autocast(tensors[-1]) or len(kept[0]) != len(tensors):
            return None
        return kept[2] if all(stamp.fits(tensor) for stamp, tensor in zip(kept[0], tensors, strict=True)) else None

    def put(self, tensors: list[Tensor], value: Any) -> None:
        """Keeps a value that was made from these tensors."""
        self._kept = [Stamp(tensor) for tensor in tensors], _autocast(tensors[-1]), value

    @property
    def alive(self) -> bool:
        """Whether the tensors that the value was made from still exist."""
        kept = self._kept
        return kept is not None and all(stamp.alive for stamp in kept[0])

    def clear(self) -> None:
        """Forgets it."""
        self._kept = None

    # A copy or a pickle of a model starts with an empty cache: its weights are other tensors.
    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.clear()


class KeptValues:
    """Values for several graphs, the last used ones up to a number of bytes."""

    def __init__(self) -> None:
        self._entries: tuple[tuple[KeptValue, int], ...] = ()  # replaced as a whole: two threads may use one model

    def get(self, tensors: list[Tensor]) -> Any:
        """The value that was made from these tensors, if none has changed."""
        for entry, _ in self._entries:
            value = entry.get(tensors)
            if value is not None:
                return value
        return None

    def put(self, tensors: list[Tensor], value: Any, size: int, limit: int) -> None:
        """Keeps a value of `size` bytes, and of the others the newest, `limit` bytes in all; none of a graph gone."""
        new = KeptValue()
        new.put(tensors, value)
        entries, total = [(new, size)], size
        for entry, other in self._entries:
            total += other
            if entry.alive and total <= limit:
                entries.append((entry, other))
        self._entries = tuple(entries)

    def clear(self) -> None:
        """Forgets all."""
        self._entries = ()

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.clear()


def _autocast(tensor: Tensor) -> tuple[bool, torch.dtype]:
    kind = tensor.device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
