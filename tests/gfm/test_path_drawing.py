"""Pictures of paths: nothing overlaps, nothing leaks, the same bytes every time."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkit.gfm import Explanation, Path, PathStep, draw_paths
from ragkit.gfm.path_drawing import DARK, LIGHT, SVG
from ragkit.gfm.path_layout import columns_of, lay_out
from ragkit.gfm.path_picture import clean, label_of, lines_of, picture_graph, shorten


def step(head, relation, tail, inverse=False, total=0.1, layer=1):
    ids = {}
    for name in (head, relation, tail):
        ids[name] = zlib.crc32(name.encode("utf-8", "replace"))
    return PathStep(head, ids[head], relation, ids[relation], tail, ids[tail], inverse, layer, total, total)


def explanation(*paths, question="Which country borders Peru?", target="chile", kind="entity", note=""):
    starts = dict(path[0].start for path in paths)
    ends = dict(path[-1].end for path in paths)
    made = tuple(Path(tuple(path), sum(s.weight for s in path) / len(path)) for path in paths)
    return Explanation(question, target, kind, 0.5, "logit", starts, ends, made, note)


@pytest.fixture
def example():
    return explanation(
        [step("lima", "capital of", "peru", total=0.4), step("peru", "borders", "chile", total=0.3)],
        [step("lima", "twin city", "santiago"), step("santiago", "capital of", "chile", total=-0.05)],
        [step("lima", "capital of", "peru", total=0.4), step("chile", "neighbour of", "peru", inverse=True)],
    )


def texts(svg):
    return ["".join(e.itertext()) for e in ET.fromstring(svg).iter(f"{{{SVG}}}text")]


def titles(svg):
    return [e.text for e in ET.fromstring(svg).iter(f"{{{SVG}}}title")]


def test_svg_says_what_there_is(example):
    svg = draw_paths(example)
    root = ET.fromstring(svg)
    assert root.tag == f"{{{SVG}}}svg" and root.get("role") == "img"
    label = "3 paths to chile (entity), logit 0.5, for the question: Which country borders Peru?"
    assert root.get("aria-label") == label and root[0].tag == f"{{{SVG}}}title" and root[0].text == label
    found = texts(svg)
    for text in ("lima", "peru", "santiago", "chile", "borders", "neighbour of", "twin city"):
        assert found.count(text) == 1
    assert found.count("capital of") == 2
    for text in ("entity of the question", "on the way", "scored entity", "lowers the score"):
        assert text in found
    assert "lima (entity of the question)" in titles(svg)
    assert "lima \u2014 capital of \u2192 peru: 0.4 (layer 1)" in titles(svg)
    assert "chile \u2014 neighbour of \u2192 peru: 0.1 (layer 1)" in titles(svg)


def test_svg_is_self_contained_and_the_same_each_time(example):
    svg = draw_paths(example)
    assert svg == draw_paths(example)
    for word in ("<?xml", "DOCTYPE", "metadata", "<image", "http://purl.org", "date", "<script"):
        assert word not in svg
    root = ET.fromstring(svg)
    links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
    assert all(link.startswith("#") for link in links)
    assert not [e for e in root.iter(f"{{{SVG}}}g") if e.get("id")]
    png = draw_paths(example, "png")
    assert png == draw_paths(example, "png") and png[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"matplotlib" not in png.lower() and b"tIME" not in png


def test_light_and_dark_differ_in_colours_only(example):
    light, dark = draw_paths(example), draw_paths(example, dark=True)
    assert LIGHT.ground in light and DARK.ground in dark and DARK.ground not in light
    assert texts(light) == texts(dark)


@pytest.mark.parametrize("look", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(look):
    """WCAG 2.1: 4.5 for text on what it stands on, 3 for lines that mean something."""

    def luminance(color):
        parts = [c / 255 for c in bytes.fromhex(color[1:])]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    def contrast(a, b):
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for face, edge in (look.question, look.between, look.target):
        assert contrast(look.text, face) >= 4.5 and contrast(edge, look.ground) >= 3
    assert contrast(look.text, look.ground) >= 4.5 and contrast(look.faint, look.ground) >= 4.5
    assert contrast(look.raises[1], look.ground) >= 3 and contrast(look.lowers[1], look.ground) >= 3


def test_the_size_of_the_contribution_is_width_and_colour(example):
    root = ET.fromstring(draw_paths(example))
    widths = {}
    for group in root.iter(f"{{{SVG}}}g"):
        title = group.find(f"{{{SVG}}}title")
        path = group.find(f"{{{SVG}}}path")
        if title is not None and "\u2192" in title.text and path is not None and "fill: none" in path.get("style"):
            style = dict(part.split(": ") for part in path.get("style").split("; "))
            widths[title.text] = float(style["stroke-width"]), style["stroke"]
    wide = {text.split(":")[0]: value for text, value in widths.items()}
    order = [f"{a} \u2014 {r} \u2192 {b}" for a, r, b in (
        ("santiago", "capital of", "chile"), ("peru", "borders", "chile"), ("lima", "capital of", "peru")
    )]  # fmt: skip
    sizes = [wide[name][0] for name in order]
    assert sizes == sorted(sizes) and sizes[0] < sizes[1] < sizes[2]
    assert wide[order[2]][1] == LIGHT.raises[1] and len({color for _, color in wide.values()}) == 4


def test_names_that_break_things():
    nasty = ["$x^2$ <b>&\"'", "a\x00b\x1f\ud800c", "\u5317\u4eac \u05d0\u05d1", "x" * 300, "two\nlines\there"]
    path = [step(a, "rel <i>$y$", b) for a, b in zip(nasty[:-1], nasty[1:], strict=True)]
    found = explanation(path, question="<script>$", target=nasty[-1])
    svg = draw_paths(found)
    assert "<script" not in svg and "<b>" not in svg
    shown = texts(svg)
    assert "$x^2$ <b>&\"'" in shown and "a\ufffdb \ufffdc" in shown and "two lines here" in shown
    assert all(len(text) < 100 for text in shown)
    assert f"{'x' * 300} (entity on the way)" in titles(svg)  # the whole name is the tooltip
    assert isinstance(draw_paths(found, "png", dark=True), bytes)


def test_texts_are_shortened():
    assert clean(" a \n b\x07 ") == "a b\ufffd"
    for name in ("می\u200cخواهم", "क्\u200dष", "👩\u200d👧"):  # Persian, Hindi, a family
        assert clean(name) == name
    assert clean("\u202eabc\u2066 d\u00ade\ufeff") == "abc de"
    assert shorten("abcdef", 4) == "abc\u2026" and shorten("abcd", 4) == "abcd"
    assert lines_of("one two three four five six", 9, 2) == ["one two", "three fo\u2026"]
    assert lines_of("", 9, 2) == [" "]


def test_triples_between_the_same_two_share_an_arrow():
    many = [[step("a", f"r{i}", "b", total=i / 10)] for i in range(5)]
    back = [step("b", "back", "a", inverse=True, total=0.2)]
    nodes, edges = picture_graph(explanation(*many, back, many[0]))
    assert [node.name for node in nodes] == ["a", "b"] and [node.role for node in nodes] == ["question", "target"]
    assert [label_of(edge) for edge in edges] == [["r4", "r3", "and 3 more"], ["back"]]
    assert edges[0].total == pytest.approx(1.0) and edges[0].forward and not edges[1].forward


def test_without_paths_the_note_is_there():
    lone = Explanation("q", "chile", "entity", 0.1, "logit", {0: "lima"}, {1: "chile"}, (), "No path: none of 3 hops.")
    svg = draw_paths(lone)
    assert {"lima", "chile", "No path: none of 3 hops."} <= set(texts(svg))
    nobody = Explanation("", "doc", "document", 0.0, "idf", {0: "lima"}, {}, (), "No path: the document has none.")
    assert "0 paths to doc (document)" in draw_paths(nobody)


def test_formats(example):
    with pytest.raises(ValueError, match='"svg" or "png", found \'gif\''):
        draw_paths(example, "gif")
    assert example.draw("png") == draw_paths(example, "png")


def test_png_has_its_size(example):
    png = draw_paths(example, "png")
    width, height = struct.unpack(">II", png[16:24])
    assert 600 < width < 2000 and 200 < height < 800


# ---- layout ----


def overlap(a, b):
    return (
        abs(a.x - b.x) < (a.width + b.width) / 2 - 1e-9 and abs(a.y - b.y) < (a.height + b.height) / 2 - 1e-9
    )  # fmt: skip


@settings(max_examples=60)
@given(st.integers(2, 60), st.data())
def test_nothing_overlaps_and_edges_go_right(count, data):
    pairs = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda p: p[0] != p[1])
    edges = data.draw(st.lists(pairs, max_size=80, unique=True))
    sizes = [(0.5 + (i * 7 % 10) / 10, 0.3 + (i * 3 % 4) / 10) for i in range(count)]
    labels = [(0.3 + (i % 5) / 5, 0.15 + (i % 3) / 8) for i in range(len(edges))]
    found = lay_out(sizes, edges, labels, [count - 1])
    solid = [item for item in found.items if item.width]
    assert len(solid) == count + len(edges)
    assert not any(overlap(a, b) for i, a in enumerate(solid) for b in solid[:i])
    for chain, (a, b) in zip(found.chains, edges, strict=True):
        assert {chain[0], chain[-1]} == {a, b}
        assert [found.items[i].column for i in chain] == list(
            range(found.items[chain[0]].column, found.items[chain[-1]].column + 1)
        )
    for item in found.items:
        assert -1e-9 <= item.x - item.width / 2 and item.x + item.width / 2 <= found.width + 1e-9
        assert -1e-9 <= item.y - item.height / 2 and item.y + item.height / 2 <= found.height + 1e-9


def test_columns_are_the_longest_way():
    assert columns_of(4, [(0, 1), (1, 2), (0, 3), (2, 3)], [3]) == [0, 1, 2, 3]
    assert columns_of(3, [(0, 1), (1, 0), (1, 2)], []) == [0, 1, 2]  # the second closes a cycle
    assert columns_of(2, [], [1]) == [0, 1]


def test_crossings_are_undone():
    """Two parallel chains, given so that they would cross."""
    found = lay_out([(1, 0.3)] * 4, [(0, 3), (1, 2)], [(0.4, 0.2)] * 2)
    y = [item.y for item in found.items[:4]]
    assert (y[0] - y[1]) * (y[3] - y[2]) > 0
