"""Lists of ids of different length in two arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ragged:
    """Q lists of ids; `lists[i]` is the i-th.

    Attributes:
        ptr: [Q + 1] int64; list i is `ids[ptr[i] : ptr[i + 1]]`.
        ids: [M] int64.
    """

    ptr: Tensor
    ids: Tensor

    @classmethod
    def of(cls, lists: Iterable[Sequence[int]]) -> Ragged:
        """From lists of numbers."""
        flat: list[int] = []
        ends = [0]
        for ids in lists:
            flat.extend(ids)
            ends.append(len(flat))
        return cls(torch.tensor(ends, dtype=torch.int64), torch.tensor(flat, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.ptr) - 1

    def __getitem__(self, index: int) -> Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"list {index} of {len(self)}")
        index %= len(self)
        return self.ids[int(self.ptr[index]) : int(self.ptr[index + 1])]

    def at(self, indices: Iterable[int]) -> list[Tensor]:
        """The lists at these places."""
        return [self[int(index)] for index in indices]
