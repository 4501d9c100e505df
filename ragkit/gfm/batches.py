"""The order of a GFM training: one graph in a batch, every data set whole in every epoch, the same on any machine.

A batch is a pure function of (seed, epoch, number): a resumed run finds the same ones, and with P processes the P
batches of a step are the parts of the one that a single process with a P times larger batch would take.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


@dataclass(frozen=True, eq=False)
class BatchKey:
    """Which examples a batch holds.

    Attributes:
        dataset: Name of the data set; a batch is of one alone.
        places: [B'] places of the examples of all processes in the data set.
        mine: Which of them this process takes: `places[mine]`.
        share: Factor of this process's mean loss, so that the mean over processes is the mean over all B' examples.
        seed: Seed of whatever is drawn for this batch; the same in all processes.
    """

    dataset: str
    places: Tensor
    mine: slice
    share: float
    seed: int


class EpochBatches(Sampler[list[BatchKey]]):
    """The batches of one process, epoch by epoch.

    Args:
        sizes: Number of examples of each data set.
        batch_size: Examples in a batch on each process.
        seed: Seed of the order.
        rank: This process.
        world: Number of processes.
        most: At most so many batches of each data set in an epoch (other examples in every epoch); None: all.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        most: int | None = None,
    ) -> None:
        self.sizes, self.batch_size, self.seed = dict(sizes), batch_size, seed
        self.rank, self.world, self.most = rank, world, most
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch (from 0) that the next iteration goes through."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        """Batches in an epoch, for each process."""
        return sum(self._count(size) for size in self.sizes.values())

    def _count(self, size: int) -> int:
        count = -(-size // (self.batch_size * self.world))
        return count if self.most is None else min(count, self.most)

    def __iter__(self) -> Iterator[list[BatchKey]]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        pieces: list[tuple[str, Tensor]] = []
        for name, size in self.sizes.items():
            order = torch.randperm(size, generator=generator)
            parts = order.split(self.batch_size * self.world)
            pieces += [(name, part) for part in parts[: self._count(size)]]
        for number, place in enumerate(torch.randperm(len(pieces), generator=generator).tolist()):
            name, places = pieces[place]
            yield [self._key(name, places, mixed_seed(self.seed, self.epoch, number + 1))]

    def _key(self, name: str, places: Tensor, seed: int) -> BatchKey:
        size = len(places)
        ends = [size * rank // self.world for rank in range(self.world + 1)]
        mine = slice(ends[self.rank], ends[self.rank + 1])
        if mine.start == mine.stop:  # fewer examples than processes: one to go along with, which counts for nothing
            return BatchKey(name, places, slice(0, 1), 0.0, seed)
        return BatchKey(name, places, mine, (mine.stop - mine.start) * self.world / size, seed)


class _Made(Dataset[Any]):
    """What is trained on, seen as a data set whose indices are batches."""

    def __init__(self, size: int, make: Callable[[BatchKey], dict[str, Any]]) -> None:
        self.size, self.make = size, make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: BatchKey) -> dict[str, Any]:
        return self.make(key)


class EpochLoader(DataLoader[Any]):
    """A `DataLoader` over `EpochBatches`, as the Trainer takes it.

    Args:
        batches: The order.
        make: Makes the batch of a key.
    """

    def __init__(self, batches: EpochBatches, make: Callable[[BatchKey], dict[str, Any]]) -> None:
        data = _Made(sum(batches.sizes.values()), make)
        super().__init__(data, batch_sampler=batches, collate_fn=_first)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Tells the order which epoch comes; called by the Trainer."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def _first(items: list[dict[str, Any]]) -> dict[str, Any]:
    return items[0]


def mixed_seed(*numbers: int) -> int:
    """A seed made of several numbers; near ones give seeds that have nothing in common."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
