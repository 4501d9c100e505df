"""Seeded samples: of the size asked for, in order, one within the other, and each place as likely as the next."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.sampling import draw


@given(count=st.integers(0, 60), smaller=st.integers(0, 60), more=st.integers(0, 60), seed=st.integers(0, 2**40))
def test_a_smaller_sample_is_part_of_a_larger_one(count, smaller, more, seed):
    small, large = draw(count, smaller, seed), draw(count, smaller + more, seed)
    assert small == sorted(set(small)) and set(small) <= set(large) <= set(range(count))
    assert (len(small), len(large)) == (min(smaller, count), min(smaller + more, count))
    assert draw(count, smaller, seed) == small
    assert draw(count, None, seed) == list(range(count))


def test_every_place_is_as_likely_as_the_next():
    drawn = [place for seed in range(2000) for place in draw(10, 3, seed)]
    counts = [drawn.count(place) for place in range(10)]
    assert all(abs(count - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5 for count in counts), counts


def test_a_size_below_0_is_refused():
    with pytest.raises(ValueError, match="size: found -1, expected 0 or more, or None for all"):
        draw(5, -1)
