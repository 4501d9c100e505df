"""Places for the boxes and labels of a small directed graph, left to right, so that nothing overlaps.

Sugiyama, Tagawa and Toda 1981 in its usual steps: nodes to columns, a place in every column between for each edge, an
order in the columns with few crossings, heights. An edge's label has a place of its own, as a node would.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

NODE_GAP = 0.16  # inches between two boxes of a column
LABEL_GAP = 0.07
COLUMN_GAP = 0.46  # between a column of boxes and one of labels
ROUNDS = 12


@dataclass
class Item:
    """Something with a place in a column: a node, a label, or an edge that passes.

    Attributes:
        column: Even for nodes, odd for labels.
        width, height: Inches; 0 for an edge that passes.
        x, y: Its centre.
        gap: To the next in the column.
    """

    column: int
    width: float
    height: float
    gap: float
    x: float = 0.0
    y: float = 0.0
    left: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)


@dataclass
class Layout:
    """Where everything is, in inches from the lower left.

    Attributes:
        items: The nodes first, in the order given, then what lies on the edges.
        chains: For each edge the items on it from left to right, both nodes included.
        labels: For each edge its label's item.
        columns: For each column (left, right).
        width, height: Of all.
    """

    items: list[Item]
    chains: list[list[int]]
    labels: list[int]
    columns: list[tuple[float, float]]
    width: float
    height: float


def lay_out(
    nodes: Sequence[tuple[float, float]],
    edges: Sequence[tuple[int, int]],
    labels: Sequence[tuple[float, float]],
    last: Sequence[int] = (),
) -> Layout:
    """Lays a graph out; the same input gives the same places.

    Args:
        nodes: (width, height) of each.
        edges: (from, to), the most important first. An edge that closes a cycle with those before it goes right to
            left. Loops are not allowed.
        labels: (width, height) of each edge's label.
        last: Nodes to put in the last column, if no edge leaves them.
    """
    column = columns_of(len(nodes), edges, last)
    items = [Item(2 * c, w, h, NODE_GAP) for c, (w, h) in zip(column, nodes, strict=True)]
    room = [0.0] * (2 * max(column, default=0) + 1)  # height of the labels in a column so far
    chains, places = [], []
    for (a, b), (width, height) in zip(edges, labels, strict=True):
        a, b = (a, b) if column[a] < column[b] else (b, a)
        middle = min(range(2 * column[a] + 1, 2 * column[b], 2), key=lambda c: room[c])
        room[middle] += height + LABEL_GAP
        chain = [a]
        for at in range(2 * column[a] + 1, 2 * column[b]):
            chain.append(len(items))
            if at == middle:
                places.append(len(items))
            items.append(Item(at, *((width, height) if at == middle else (0.0, 0.0)), LABEL_GAP))
        chain.append(b)
        for one, two in zip(chain[:-1], chain[1:], strict=True):
            items[one].right.append(two)
            items[two].left.append(one)
        chains.append(chain)
    order = ordered(items)
    set_heights(items, order)
    low = min((i.y - i.height / 2 for i in items), default=0.0)
    for item in items:
        item.y -= low
    x, spans = 0.0, []
    for members in order:
        width = max((items[i].width for i in members), default=0.0)
        spans.append((x, x + width))
        for i in members:
            items[i].x = x + width / 2
        x += width + COLUMN_GAP
    height = max((i.y + i.height / 2 for i in items), default=0.0)
    return Layout(items, chains, places, spans, max(0.0, x - COLUMN_GAP), height)


def columns_of(count: int, edges: Sequence[tuple[int, int]], last: Sequence[int]) -> list[int]:
    """[count] column of each node: the longest way to it over edges that close no cycle with those before them."""
    after: list[set[int]] = [set() for _ in range(count)]
    for a, b in edges:
        if not _reaches(after, b, a):
            after[a].add(b)
    column = [0] * count
    waiting = [sum(b in nexts for nexts in after) for b in range(count)]
    ready = [node for node in range(count) if not waiting[node]]
    for node in ready:  # grows while it is walked
        for b in sorted(after[node]):
            column[b] = max(column[b], column[node] + 1)
            waiting[b] -= 1
            if not waiting[b]:
                ready.append(b)
    end = max(column, default=0)
    for node in last:
        if not after[node]:
            column[node] = max(end, 1)
    return column


def _reaches(after: list[set[int]], start: int, goal: int) -> bool:
    seen, todo = {start}, [start]
    while todo:
        node = todo.pop()
        if node == goal:
            return True
        todo += after[node] - seen
        seen |= after[node]
    return False


def ordered(items: Sequence[Item]) -> list[list[int]]:
    """The items of each column from bottom to top, after sweeps that sort by the mean place of the neighbours."""
    order: list[list[int]] = [[] for _ in range(max((i.column for i in items), default=-1) + 1)]
    for number in reversed(range(len(items))):  # so that the most important end up at the top
        order[items[number].column].append(number)
    best, least = [list(c) for c in order], _crossings(items, order)
    for sweep in range(ROUNDS):
        rightwards = sweep % 2 == 0
        places = {i: float(p) for members in order for p, i in enumerate(members)}
        for members in order if rightwards else reversed(order):
            mean = {}
            for i in members:
                near = items[i].left if rightwards else items[i].right
                mean[i] = sum(places[n] for n in near) / len(near) if near else places[i]
            members.sort(key=mean.__getitem__)
            places.update({i: float(p) for p, i in enumerate(members)})
        crossings = _crossings(items, order)
        if crossings < least:
            best, least = [list(c) for c in order], crossings
    return best


def _crossings(items: Sequence[Item], order: list[list[int]]) -> int:
    total = 0
    for members, nexts in zip(order[:-1], order[1:], strict=True):
        place = {i: p for p, i in enumerate(nexts)}
        seen: list[int] = []
        for i in members:
            ends = sorted(place[n] for n in items[i].right)
            total += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return total


def set_heights(items: Sequence[Item], order: list[list[int]]) -> None:
    """Sets y: each item near the mean of its neighbours, none above another."""
    for members in order:
        y = 0.0
        for i in members:
            items[i].y = y + items[i].height / 2
            y += items[i].height + items[i].gap
        for i in members:
            items[i].y -= y / 2
    for sweep in range(2 * ROUNDS):
        for members in order if sweep % 2 == 0 else reversed(order):
            wanted = []
            for i in members:
                near = items[i].left + items[i].right
                wanted.append(sum(items[n].y for n in near) / len(near) if near else items[i].y)
            for i, y in zip(members, _apart(items, members, wanted), strict=True):
                items[i].y = y


def _apart(items: Sequence[Item], members: list[int], wanted: list[float]) -> list[float]:
    """The heights nearest to those wanted (least squares) that keep the order and the gaps: pooled neighbours."""
    shift, shifts = 0.0, []
    for place, i in enumerate(members):
        if place:
            one, two = items[members[place - 1]], items[i]
            shift += (one.height + two.height) / 2 + max(one.gap, two.gap)
        shifts.append(shift)
    pools: list[tuple[float, int]] = []  # (sum, count) of what shares one value
    for y, s in zip(wanted, shifts, strict=True):
        total, many = y - s, 1
        while pools and pools[-1][0] / pools[-1][1] > total / many:
            before_sum, before_many = pools.pop()
            total, many = total + before_sum, many + before_many
        pools.append((total, many))
    values = [total / many for total, many in pools for _ in range(many)]
    return [value + s for value, s in zip(values, shifts, strict=True)]
