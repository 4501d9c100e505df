"""Places for the boxes of a graph, so that what belongs together is near, and nothing overlaps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

ROUNDS = 240
PAD = 13.0  # pixels between two boxes, at least; an arrow's head must fit
ROOM = 3.4  # of the boxes' own area
ASPECT = 1.7  # width to height
ASIDE = 400  # rounds in which boxes leave lines


def place(
    sizes: Sequence[tuple[float, float]],
    springs: Sequence[tuple[int, int]],
    columns: Mapping[int, float],
    lines: Sequence[tuple[int, int]] = (),
    seed: int = 0,
) -> tuple[np.ndarray, float, float]:
    """Lays boxes out by forces (Fruchterman and Reingold 1991), then moves them apart.

    Places are rounded in every round, so that machines whose arithmetic differs in the last bit find the same ones.

    Args:
        sizes: (width, height) of n boxes, in pixels.
        springs: Pairs of boxes that pull each other.
        columns: Box -> where it is held, from 0 (left) to 1 (right).
        lines: Pairs of boxes; as far as possible no third one lies on the way from one to the other.
        seed: Of the places at first.

    Returns:
        [n, 2] centres, and width and height of all.
    """
    n = len(sizes)
    box = np.array(sizes, float).reshape(n, 2)
    if not n:
        return box, 0.0, 0.0
    area = ROOM * float(((box[:, 0] + PAD) * (box[:, 1] + PAD)).sum())
    extent = np.array([math.sqrt(area * ASPECT), math.sqrt(area / ASPECT)])
    at = _forces(n, springs, columns, seed)
    low, high = at.min(0), at.max(0)
    at = (at - low) / np.maximum(high - low, 1e-9) * np.maximum(extent - box.max(0), 1.0)
    at = apart(at, box, lines)
    corner = (at - box / 2).min(0)
    at = np.round(at - corner, 1)
    width, height = (at + box / 2).max(0)
    return at, float(width), float(height)


def _forces(n: int, springs: Sequence[tuple[int, int]], columns: Mapping[int, float], seed: int) -> np.ndarray:
    """[n, 2] places in about the unit square."""
    at = np.round(np.random.default_rng(seed).random((n, 2)), 6)
    held = np.array(sorted(columns), int)
    wanted = np.array([columns[i] for i in held.tolist()])
    at[held, 0] = wanted
    pairs = np.array([pair for pair in springs if pair[0] != pair[1]], int).reshape(-1, 2)
    k = math.sqrt(1.0 / n)
    for step in range(ROUNDS):
        x, y = at[:, 0], at[:, 1]
        across, down = x[:, None] - x, y[:, None] - y  # [n, n]
        push = k * k / np.maximum(across * across + down * down, 1e-6)
        force = np.stack([(across * push).sum(1), (down * push).sum(1)], 1)
        if len(pairs):
            along = at[pairs[:, 0]] - at[pairs[:, 1]]
            pull = along * (np.sqrt((along * along).sum(1)) / k)[:, None]
            np.add.at(force, pairs[:, 0], -pull)
            np.add.at(force, pairs[:, 1], pull)
        force += 0.6 * (0.5 - at)  # what hangs on nothing stays near
        length = np.sqrt((force * force).sum(1))
        most = 0.12 * (1 - step / ROUNDS) + 0.002
        at = at + force * np.minimum(1.0, most / np.maximum(length, 1e-9))[:, None]
        at[held, 0] += 0.7 * (wanted - at[held, 0])
        at = np.round(at, 6)
    return at


def apart(at: np.ndarray, box: np.ndarray, lines: Sequence[tuple[int, int]] = ()) -> np.ndarray:
    """Moves boxes as little as need be, until none overlaps another; where that takes long, all spread a little."""
    n = len(at)
    need = (box[:, None] + box[None]) / 2 + PAD  # [n, n, 2]
    wide, high = need[..., 0].copy(), need[..., 1].copy()
    at = at + np.linspace(0.0, 0.5, n)[:, None]  # no two at the same place
    others = ~np.eye(n, dtype=bool)
    ends = np.array(lines, int).reshape(-1, 2)
    free = ~np.isin(np.arange(n), ends)
    for step in range(4000):
        aside = _aside(at, box, ends, free) if step < ASIDE and len(ends) else np.zeros((n, 2))
        x, y = at[:, 0], at[:, 1]
        across, down = x[:, None] - x, y[:, None] - y  # [n, n]
        one, two = np.nonzero((np.abs(across) < wide - 0.05) & (np.abs(down) < high - 0.05) & others)
        if not len(one) and not aside.any():
            break
        gap = np.stack([across[one, two], down[one, two]], 1)  # [hits, 2]
        over = need[one, two] - np.abs(gap)
        by_x = over[:, 0] <= over[:, 1] * 1.6  # rather up and down: boxes are wide
        move = over * np.stack([by_x, ~by_x], 1) * np.where(gap == 0, np.sign(one - two)[:, None], np.sign(gap)) / 2
        shift = np.stack([np.bincount(one, move[:, axis], n) for axis in (0, 1)], 1)
        at = at + np.clip(shift, -40.0, 40.0) * 0.9 + aside
        if step % 40 == 39:
            at = at * 1.04
        at = np.round(at, 4)
    return at


def _aside(at: np.ndarray, box: np.ndarray, ends: np.ndarray, free: np.ndarray) -> np.ndarray:
    """[n, 2]: how far boxes must go to leave the lines between the ends, at most some pixels a round."""
    start, way = at[ends[:, 0]], at[ends[:, 1]] - at[ends[:, 0]]  # [lines, 2]
    length = np.maximum(np.sqrt((way * way).sum(1)), 1e-6)
    normal = np.stack([-way[:, 1], way[:, 0]], 1) / length[:, None]
    gap = at[None] - start[:, None]  # [lines, n, 2]
    along = (gap * way[:, None]).sum(2) / (length * length)[:, None]  # 0 at the start, 1 at the end
    off = (gap * normal[:, None]).sum(2)
    need = (np.abs(normal)[:, None] * box[None] / 2).sum(2) + 5.0
    hit = (along > 0) & (along < 1) & (np.abs(off) < need - 0.05) & free
    push = np.where(hit, np.where(off >= 0, 1.0, -1.0) * np.minimum(need - np.abs(off), 6.0), 0.0)  # [lines, n]
    return np.round((push[..., None] * normal[:, None]).sum(0), 4)
