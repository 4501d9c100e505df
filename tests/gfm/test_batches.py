"""The order of a training: every example once an epoch, the same batches on any number of processes and after a
resume."""

from __future__ import annotations

import collections

import pytest
import torch
from accelerate import skip_first_batches
from hypothesis import given
from hypothesis import strategies as st

from ragkit.gfm.batches import BatchKey, EpochBatches, EpochLoader, mixed_seed

sizes = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.integers(1, 40), min_size=1)


def keys_of(batches: EpochBatches, epoch: int = 0) -> list[BatchKey]:
    batches.set_epoch(epoch)
    found = list(batches)
    assert len(found) == len(batches) and all(len(keys) == 1 for keys in found)
    return [keys[0] for keys in found]


def plain(key: BatchKey) -> tuple:
    return key.dataset, key.places.tolist(), key.mine, key.share, key.seed


@given(sizes, st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
def test_every_example_once_an_epoch_on_any_number_of_processes(sizes, batch_size, world, epoch):
    ranks = [keys_of(EpochBatches(sizes, batch_size, 7, rank, world), epoch) for rank in range(world)]
    one = keys_of(EpochBatches(sizes, batch_size * world, 7), epoch)
    assert {len(keys) for keys in ranks} == {len(one)}  # no process waits for another
    seen = collections.Counter()
    for whole, parts in zip(one, zip(*ranks, strict=True), strict=True):
        assert whole.share == 1 and whole.places[whole.mine].tolist() == whole.places.tolist()
        assert 1 <= len(whole.places) <= batch_size * world
        taken = []
        for part in parts:
            assert (part.dataset, part.seed, part.places.tolist()) == (
                whole.dataset,
                whole.seed,
                whole.places.tolist(),
            )
            mine = part.places[part.mine].tolist()
            assert 1 <= len(mine) <= batch_size  # never empty: each process must take part in the backward pass
            taken += mine if part.share else []
            # The mean over processes of share · (mean over mine) is the mean over all examples.
            assert part.share * len(whole.places) == pytest.approx(len(mine) * world if part.share else 0)
        assert taken == whole.places.tolist()
        assert sum(part.share for part in parts) == pytest.approx(world)
        seen.update((whole.dataset, place) for place in taken)
    assert seen == {(name, place): 1 for name, size in sizes.items() for place in range(size)}


@given(sizes, st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))
def test_most_caps_each_data_set_by_itself(sizes, batch_size, world, most):
    """GFM-RAG v1 counts its batches over all data sets, so that a first large one used up the epoch."""
    batches = EpochBatches(sizes, batch_size, 1, world - 1, world, most=most)
    whole = collections.Counter(key.dataset for key in keys_of(EpochBatches(sizes, batch_size, 1, 0, world)))
    keys = keys_of(batches)
    assert collections.Counter(key.dataset for key in keys) == {n: min(c, most) for n, c in whole.items()}
    places = [(key.dataset, place) for key in keys for place in key.places.tolist()]
    assert len(set(places)) == len(places)


def test_capped_epochs_take_other_examples_and_reach_them_all():
    batches = EpochBatches({"a": 40, "b": 6}, 4, seed=0, most=2)
    epochs = [{(k.dataset, p) for k in keys_of(batches, e) for p in k.places.tolist()} for e in range(30)]
    assert all(len(places) == 14 for places in epochs)  # 8 of a, all 6 of b
    assert len({frozenset(places) for places in epochs}) > 25
    assert len(set().union(*epochs)) == 46


def test_an_epoch_is_a_function_of_seed_and_number():
    first, again = (EpochBatches({"a": 21, "b": 9}, 4, seed=5) for _ in range(2))
    order = {epoch: [plain(key) for key in keys_of(first, epoch)] for epoch in range(3)}
    torch.manual_seed(99)  # no other random numbers matter
    assert {epoch: [plain(key) for key in keys_of(again, epoch)] for epoch in (2, 0, 1)} == order
    assert order[0] != order[1] != order[2]
    assert [plain(k) for k in keys_of(EpochBatches({"a": 21, "b": 9}, 4, seed=6))] != order[0]
    seeds = [key[-1] for keys in order.values() for key in keys]
    assert len(set(seeds)) == len(seeds)  # what is drawn for one batch is drawn for no other
    names = [key[0] for key in order[0]]
    assert names != sorted(names) and names != sorted(names, reverse=True)  # data sets take turns


def test_a_data_set_smaller_than_the_number_of_processes():
    keys = [keys_of(EpochBatches({"a": 2}, 3, 0, rank, 5))[0] for rank in range(5)]
    taken = [key.places[key.mine].tolist() for key in keys]
    assert [len(places) for places in taken] == [1] * 5 and sorted(key.share for key in keys) == [0, 0, 0, 2.5, 2.5]
    assert sorted(p for key, places in zip(keys, taken, strict=True) if key.share for p in places) == [0, 1]


@given(sizes, st.integers(1, 5), st.integers(0, 3), st.data())
def test_a_resumed_loader_gives_the_remaining_batches(sizes, batch_size, epoch, data):
    def loader():
        return EpochLoader(EpochBatches(sizes, batch_size, 3), lambda key: {"key": plain(key)})

    whole = loader()
    whole.set_epoch(epoch)
    expected = [batch["key"] for batch in whole]
    assert len(whole) == len(expected)
    done = data.draw(st.integers(0, len(expected)))
    resumed = loader()
    resumed.set_epoch(epoch)
    assert [batch["key"] for batch in skip_first_batches(resumed, done)] == expected[done:]
    later = loader()
    rest = skip_first_batches(later, done)
    rest.batch_sampler.batch_sampler.set_epoch(epoch)  # the way that transformers reaches it after skipping
    assert [batch["key"] for batch in rest] == expected[done:]


def test_mixed_seeds_fit_pytorch_and_differ():
    found = {mixed_seed(a, b) for a in range(30) for b in range(30)}
    assert len(found) == 900 and all(0 <= seed < 2**63 for seed in found)
    assert mixed_seed(1, 23) != mixed_seed(12, 3) and mixed_seed(1024, 0) == mixed_seed(1024, 0)
    for seed in list(found)[:20]:
        torch.Generator().manual_seed(seed)
