"""A seeded sample of questions."""

from __future__ import annotations

import random


def draw(count: int, size: int | None, seed: int = 0) -> list[int]:
    """Draws places at random, without repetition; a smaller sample of the same seed is part of a larger one.

    Args:
        count: How many places there are.
        size: How many are wanted; None, or more than there are: all.
        seed: Seed of the draw.

    Returns:
        The places, ascending.

    Raises:
        ValueError: `size` is below 0.
    """
    if size is not None and size < 0:
        raise ValueError(f"size: found {size}, expected 0 or more, or None for all")
    places = list(range(count))
    if size is None or size >= count:
        return places
    random.Random(seed).shuffle(places)
    return sorted(places[:size])
