"""The layout: every edge once in each order, every segment in exactly one piece of work, bad ids named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragkit_kernels.relational_conv import GraphLayout, build_layout
from ragkit_kernels.relational_conv.layout import UNIT_EDGES, kept_degree, work_lists
from relconv_graphs import GRAPHS, any_edges


def as_triples(segments, kind, layout):
    """The (dst, src, rel) of every edge, as the sorted copy `kind` tells it."""
    key = torch.arange(len(segments.ptr) - 1).repeat_interleave(segments.ptr.diff().long()).tolist()
    first, second, position = segments.edges.tolist()
    rows = {
        "by_dst": zip(key, first, second, strict=True),
        "by_src": zip(first, key, second, strict=True),
        "by_rel": zip(first, second, key, strict=True),
    }[kind]
    return list(rows), position


@given(any_edges())
def test_each_order_holds_every_edge_once(case):
    layout = case.layout()
    given_edges = sorted(zip(case.dst.tolist(), case.src.tolist(), case.rel.tolist(), strict=True))
    by_dst, position = as_triples(layout.by_dst, "by_dst", layout)
    assert position == list(range(len(case)))
    assert sorted(by_dst) == given_edges
    order = layout.order.tolist()
    assert by_dst == [(int(case.dst[e]), int(case.src[e]), int(case.rel[e])) for e in order]
    for kind in ("by_src", "by_rel"):
        rows, position = as_triples(getattr(layout, kind), kind, layout)
        assert sorted(position) == list(range(len(case)))
        assert rows == [by_dst[p] for p in position]


@given(st.lists(st.integers(0, 200), max_size=40))
def test_work_lists_cover_every_segment_once(counts):
    ptr = torch.tensor([0, *counts]).cumsum(0)
    units, heavy = work_lists(ptr)
    rows = [0] * len(counts)
    covered = torch.zeros(int(ptr[-1]), dtype=torch.int64)
    slots = []
    for begin, end, first, last, slot in units.tolist():
        assert last - first <= (UNIT_EDGES if slot >= 0 else 2 * UNIT_EDGES)
        covered[first:last] += 1
        if slot < 0:
            assert (first, last) == (int(ptr[begin]), int(ptr[end]))
            for row in range(begin, end):
                rows[row] += 1
        else:
            assert end == begin + 1 and counts[begin] > UNIT_EDGES
            slots.append((slot, begin, first))
    assert (covered == 1).all()
    assert rows == [0 if c > UNIT_EDGES else 1 for c in counts]
    slots.sort()
    assert [s for s, _, _ in slots] == list(range(len(slots)))
    for row, begin, end in heavy.tolist():
        mine = slots[begin:end]
        assert all(r == row for _, r, _ in mine)
        assert [first for _, _, first in mine] == sorted(first for _, _, first in mine)
    assert sorted(r for r, _, _ in heavy.tolist()) == [i for i, c in enumerate(counts) if c > UNIT_EDGES]
    sizes = (units[:, 3] - units[:, 2]).tolist()
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("name", GRAPHS)
def test_tensors_bring_the_layout_back(name):
    case = GRAPHS[name]
    layout = case.layout()
    again = GraphLayout.from_tensors(layout.tensors(), case.nodes, case.relations)
    assert all(torch.equal(a, b) for a, b in zip(layout.flat(), again.flat(), strict=True))
    assert again.max_degree == (int(torch.bincount(case.dst).max()) if len(case) else 0)
    flat = GraphLayout.from_flat(layout.flat())
    assert (flat.num_nodes, flat.num_relations, flat.num_edges) == (case.nodes, case.relations, len(case))


def test_incomplete_tensors_are_named():
    layout = GRAPHS["random"].layout()
    tensors = layout.tensors()
    del tensors["by_rel.ptr"]
    with pytest.raises(ValueError, match="the layout lacks by_rel.ptr"):
        GraphLayout.from_tensors(tensors, 40, 7)
    with pytest.raises(ValueError, match=r"by_src has 40 segments .* expected 41 segments"):
        GraphLayout.from_tensors(layout.tensors(), 41, 7)


def test_all_indices_are_int32():
    assert {t.dtype for t in GRAPHS["random"].layout().flat()} == {torch.int32}


@pytest.mark.parametrize(
    ("dst", "src", "rel", "message"),
    [
        ([0, 4], [1, 1], [0, 0], r"dst\[1\] is 4; ids must be in 0 ... 3"),
        ([0, 1], [-1, 1], [0, 0], r"src\[0\] is -1"),
        ([0, 1], [1, 1], [0, 2], r"rel\[1\] is 2; ids must be in 0 ... 1"),
        ([0, 1], [1], [0, 0], r"src must be \[E\] with E = 2, found \[1\]"),
    ],
)
def test_bad_ids_are_named(dst, src, rel, message):
    with pytest.raises(ValueError, match=message):
        build_layout(torch.tensor(dst), torch.tensor(src), torch.tensor(rel), 4, 2)


def test_float_ids_are_refused():
    with pytest.raises(ValueError, match="rel must hold integer ids, found torch.float32"):
        build_layout(torch.tensor([0]), torch.tensor([0]), torch.tensor([0.0]), 1, 1)


def test_keys_beyond_int64_sort_the_same_way():
    """Ids of a graph so large that (dst, rel, src) does not fit one int64 key are sorted one after the other."""
    from ragkit_kernels.relational_conv import layout as module

    case = GRAPHS["random"]
    small = case.layout()
    order = module._sort(case.dst, case.rel, case.src, (2**31, 2**31, 2**31))
    assert torch.equal(order.int(), small.order)


@given(any_edges(), st.integers(0, 2**31))
def test_kept_degree(case, seed):
    layout = case.layout()
    keep = torch.rand(len(case), generator=torch.Generator().manual_seed(seed)) < 0.5
    expected = torch.bincount(case.dst[keep], minlength=case.nodes)
    assert torch.equal(kept_degree(layout, keep[layout.order.long()].to(torch.uint8)), expected)
    assert torch.equal(kept_degree(layout, None), torch.bincount(case.dst, minlength=case.nodes))
