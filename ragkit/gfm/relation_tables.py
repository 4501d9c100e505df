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
        self._stamps: list[Stamp] = []
        self._autocast: tuple[bool, torch.dtype] | None = None
        self._value: Any = None

    def get(self, tensors: list[Tensor]) -> Any:
        """The value, if it was made from these tensors and none has changed."""
        if self._value is None or self._autocast != _autocast(tensors[-1]) or len(self._stamps) != len(tensors):
            return None
        fits = all(stamp.fits(tensor) for stamp, tensor in zip(self._stamps, tensors, strict=True))
        return self._value if fits else None

    def put(self, tensors: list[Tensor], value: Any) -> None:
        """Keeps a value that was made from these tensors."""
        self._stamps = [Stamp(tensor) for tensor in tensors]
        self._autocast, self._value = _autocast(tensors[-1]), value

    def clear(self) -> None:
        """Forgets it."""
        self.__init__()  # type: ignore[misc]

    # A copy or a pickle of a model starts with an empty cache: its weights are other tensors.
    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.clear()


def _autocast(tensor: Tensor) -> tuple[bool, torch.dtype]:
    kind = tensor.device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
