"""Questions that a training leaves out, to choose its weights by: parted so that nothing stands on both sides."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch


def hold_out(
    keys: Sequence[Sequence[Hashable]], share: float, seed: int, counted: Sequence[bool] | None = None
) -> tuple[list[int], list[int]]:
    """Parts questions in two, so that no key (a supporting passage) stands on both sides.

    Questions that share a key form a group; groups go to the held-out side in a seeded random order until it has
    `share` of the counted questions.

    Args:
        keys: For each question what it must not share with the other side; at least one key each.
        share: Share of the counted questions that is held out; where no group is small enough for it, the smallest.
            All questions of one group stay to be trained on.
        seed: Seed of the order.
        counted: Whether a question may be held out; None: all. Others go with their group, to neither side.

    Returns:
        (places to train on, places held out), both ascending.
    """
    may = [True] * len(keys) if counted is None else list(counted)
    groups = connected(keys)
    wanted = max(1, round(share * sum(may)))
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    out: set[int] = set()
    held: list[int] = []
    for number in order:
        mine = [place for place in groups[number] if may[place]]
        if len(held) >= wanted or len(out) + len(groups[number]) >= len(keys):
            break
        if mine and len(held) + len(mine) <= wanted * 1.5:  # a giant group stays in training
            out.update(groups[number])
            held += mine
    if not held:  # of two large groups the smaller one, rather than none to choose by
        scored = [group for group in groups if len(group) < len(keys) and any(may[place] for place in group)]
        for group in sorted(scored, key=len)[:1]:
            out.update(group)
            held = [place for place in group if may[place]]
    return [place for place in range(len(keys)) if place not in out], sorted(held)


def connected(keys: Sequence[Sequence[Hashable]]) -> list[list[int]]:
    """The places that are connected through shared keys, group by group, in the order of their first places."""
    parent: dict[Hashable, Hashable] = {}

    def root(key: Hashable) -> Hashable:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for own in keys:
        first = root(own[0])
        for key in own[1:]:
            parent[root(key)] = first
    groups: dict[Hashable, list[int]] = {}
    for place, own in enumerate(keys):
        groups.setdefault(root(own[0]), []).append(place)
    return list(groups.values())
