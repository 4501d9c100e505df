"""Pictures of neighbourhoods: readable, the same every time, and nothing that a name could break."""

from __future__ import annotations

import random
import re
import struct
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkit.gfm import Explanation, Path, PathStep, draw_neighbourhood, neighbourhood
from ragkit.gfm.looks import SVG, text_width
from ragkit.gfm.near_layout import PAD, apart, place
from ragkit.gfm.near_marks import Box
from ragkit.gfm.near_shapes import clip, through
from ragkit.gfm.neighbourhood import around
from ragkit.gfm.neighbourhood_drawing import _curve
from ragkit.gfm.path_picture import clean
from ragkit.graph import KnowledgeGraph

SIZES = [1, 5, 30, 40, 200]


@pytest.fixture(scope="module")
def graph():
    """300 entities in a few clusters, with names of many lengths."""
    draw = random.Random(0)
    words = ["river", "mount", "saint", "lake", "port", "new", "upper", "west", "isle"]
    names = [" ".join(draw.choices(words, k=draw.randint(1, 4))) + f" no{i}" for i in range(300)]
    triples = [
        (names[i], draw.choice(["part of", "borders", "location of the capital"]), names[i // 3])
        for i in range(1, 300)
    ]
    triples += [(names[draw.randrange(300)], "twin of", names[draw.randrange(300)]) for _ in range(100)]
    return KnowledgeGraph.from_triples([*triples, (names[0], "like", names[0])])


def explanation(graph, *ways):
    """Paths by names: entity, relation, entity ..."""
    paths = []
    for way in ways:
        steps = []
        for i in range(0, len(way) - 1, 2):
            head, relation, tail = way[i], way[i + 1], way[i + 2]
            ids = graph.entities.index(head), graph.relations.index(relation), graph.entities.index(tail)
            steps.append(PathStep(head, ids[0], relation, ids[1], tail, ids[2], False, i // 2 + 1, 0.1, 0.1))
        paths.append(Path(tuple(steps), 0.1))
    first, last = paths[0].steps[0], paths[0].steps[-1]
    ends = {first.head_id: first.head}, {last.tail_id: last.tail}
    return Explanation("Where is it?", last.tail, "entity", 1.0, "logit", *ends, tuple(paths))


@pytest.fixture(scope="module")
def shown(graph):
    """shown(most): a neighbourhood with two paths."""
    tail = {
        int(a): (graph.relations[int(r)], int(b))
        for a, r, b in zip(graph.head, graph.relation, graph.tail, strict=True)
    }
    at, way = 250, [graph.entities[250]]
    for _ in range(3):
        relation, at = tail[at]
        way += [relation, graph.entities[at]]
    why = explanation(graph, way, way[:5] if len(way) > 5 else way)

    def make(most):
        return around(graph, [250], None, why, hops=10, max_nodes=most)

    return make


def texts(svg):
    return ["".join(e.itertext()) for e in ET.fromstring(svg).iter(f"{{{SVG}}}text")]


def titles(svg):
    return [e.text for e in ET.fromstring(svg).iter(f"{{{SVG}}}title")]


def text_boxes(svg):
    """(left, top, right, bottom) of every text, measured by its font, and the size of the picture."""
    root = ET.fromstring(svg)
    found = []
    for element in root.iter(f"{{{SVG}}}text"):
        size, x, y = float(element.get("font-size")), float(element.get("x")), float(element.get("y"))
        width = 72 * text_width(element.text, size, element.get("font-weight") == "bold")
        left = x - (width / 2 if element.get("text-anchor") == "middle" else 0)
        found.append((left, y - 0.76 * size, left + width, y + 0.2 * size, element.text))
    return found, (float(root.get("width")), float(root.get("height")))


@pytest.mark.parametrize("most", SIZES)
def test_no_text_lies_on_another_and_all_are_in_the_picture(shown, most):
    found = shown(most)
    assert len(found.nodes) == most
    boxes, (width, height) = text_boxes(found.draw())
    assert len(boxes) >= most + 3
    for i, (left, top, right, bottom, text) in enumerate(boxes):
        assert left >= 0 and top >= 0 and right <= width and bottom <= height, text
        for a, b, c, d, other in boxes[:i]:
            assert right <= a or c <= left or bottom <= b or d <= top, (text, other)


@pytest.mark.parametrize("most", SIZES)
def test_every_entity_is_in_a_tooltip_and_has_its_name_or_its_number(shown, most):
    found = shown(most)
    svg = found.draw()
    tips, written = titles(svg), texts(svg)
    plain = " ".join(written)
    for node in found.nodes:
        (tip,) = [t for t in tips if t.startswith(f"{node.number}: {node.name} (")]
        assert f"{node.degree:,} triple" in tip
        named = node.role != "other" or node.number <= 40
        assert (clean(node.name).split()[0] in plain) if named else (str(node.number) in written)
    circles = sum(text.isdigit() and int(text) > 40 for text in written)
    assert circles == max(0, most - 40)
    assert ("number: see the table" in written) == (most > 40)


def test_paths_are_told_by_number_dash_and_label(shown):
    svg = shown(40).draw()
    root = ET.fromstring(svg)
    written = texts(svg)
    assert {"1", "2"} <= set(written) and "1, 2" in written
    assert any("(solid, weight 0.1)" in text for text in written)
    assert any("(dashed, weight 0.1)" in text for text in written)
    thick = [e for e in root.iter(f"{{{SVG}}}path") if float(e.get("stroke-width", 0)) > 2.5]
    assert {e.get("stroke-dasharray") for e in thick} >= {None, "10 4"}
    assert any("on path 1, 2" in tip for tip in titles(svg))


def test_roles_have_shapes_of_their_own(shown):
    """Without colour: round ends, double line, points and plain corners."""
    svg = shown(30).draw()
    outlines = {}
    for group in ET.fromstring(svg).iter(f"{{{SVG}}}g"):
        title = group.find(f"{{{SVG}}}title")
        if title is not None and re.match(r"\d+: ", title.text):
            role = re.search(r"\((entity of the question|what was scored|on a path|near them)\)", title.text).group(1)
            drawn = [e.get("d") for e in group.iter(f"{{{SVG}}}path")]
            outlines[role] = (drawn[-1].count("C"), drawn[-1].count("L"), len(set(drawn)))
    assert outlines["entity of the question"][:2] == (4, 4)
    assert outlines["what was scored"] == (0, 3, 2)  # two lines, one in the other
    assert outlines["on a path"][:2] == (0, 5)
    assert outlines["near them"][2] == 1


def test_the_same_bytes_each_time_and_other_places_with_another_seed(shown):
    one, two = shown(40), shown(40)
    assert one.draw() == two.draw() and one.draw("png") == two.draw("png")
    assert one.draw(seed=1) != one.draw()


def test_light_dark_themed_and_without_tooltips(shown):
    found = shown(5)
    light, dark, themed = found.draw(), found.draw(dark=True), found.draw(themed=True)
    assert "#ffffff" in light and "#16191d" in dark and "var(--" not in light + dark
    assert "var(--jp-ui-font-color1, currentColor)" in themed and 'fill="#ffffff"' not in themed
    assert titles(found.draw(tooltips=False)) == []
    for svg in (light, dark, themed):
        root = ET.fromstring(svg)
        assert root.get("role") == "img" and root.get("aria-label") == clean(found.description)
        assert not any("id" in e.attrib for e in root.iter()) and "http" not in svg.replace(SVG, "")


def test_png_has_the_size_of_the_svg(shown):
    found = shown(5)
    root, png = ET.fromstring(found.draw()), found.draw("png")
    size = struct.unpack(">II", png[16:24])
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and size == (2 * int(root.get("width")), 2 * int(root.get("height")))


@pytest.mark.parametrize("format, themed", [("pdf", False), ("png", True)])
def test_other_formats(shown, format, themed):
    with pytest.raises(ValueError, match="format: expected"):
        draw_neighbourhood(shown(5), format, themed=themed)


def test_save_goes_by_the_ending(shown, tmp_path):
    found = shown(5)
    assert found.save(tmp_path / "new" / "a.svg").read_text(encoding="utf-8") == found.draw()
    assert found.save(tmp_path / "a.PNG", dark=True).read_bytes() == found.draw("png", dark=True)
    with pytest.raises(ValueError, match="the ending is missing"):
        found.save(tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.PNG", "new"]


def test_few_edges_are_labelled_and_a_loop_has_a_tooltip():
    graph = KnowledgeGraph.from_triples([("a", "to", "b"), ("b", "back", "a"), ("b", "self", "b")])
    svg = neighbourhood(graph, entities=["a"]).draw()
    assert {"to", "back"} <= set(texts(svg)) and "self" not in texts(svg)
    assert "b — self → b" in titles(svg)


@settings(max_examples=25)
@given(st.lists(st.text(min_size=1, max_size=60).filter(lambda t: t.strip()), min_size=2, max_size=8, unique=True))
def test_any_name_makes_a_picture(names):
    try:
        graph = KnowledgeGraph.from_triples([(names[0], name, name) for name in names[1:]])
    except (ValueError, UnicodeEncodeError):  # lone surrogates are no text for Arrow
        return
    found = neighbourhood(graph, entities=[0])
    tips = titles(found.draw())
    assert all(any(clean(node.name) in tip for tip in tips) for node in found.nodes)


# ---- places ----


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(5, 200), st.integers(5, 60)), min_size=1, max_size=25),
    st.integers(0, 3),
)
def test_boxes_are_moved_apart(sizes, seed):
    box = np.array(sizes, float)
    at = np.random.default_rng(seed).integers(0, 3, (len(sizes), 2)) * 20.0  # many at the same place
    moved = apart(at, box)
    gap = np.abs(moved[:, None] - moved[None])
    free = (gap > (box[:, None] + box[None]) / 2 + PAD - 0.2).any(2)
    assert free[~np.eye(len(sizes), dtype=bool)].all()


def test_columns_hold_paths_from_left_to_right():
    places, width, height = place([(60, 20)] * 5, [(0, 1), (1, 2), (2, 3), (3, 4)], {0: 0.0, 4: 1.0})
    assert places[0, 0] < places[1:4, 0].min() and places[4, 0] > places[1:4, 0].max()
    assert (places - [30, 10] >= 0).all() and (places + [30, 10] <= [width, height]).all()
    empty, *size = place([], [], {})
    assert empty.shape == (0, 2) and size == [0.0, 0.0]


def test_curves_pass_their_label_and_begin_at_the_border():
    start, middle, end = (0.0, 0.0), (40.0, 30.0), (100.0, 0.0)
    bend = through(start, middle, end)
    half = [0.25 * a + 0.5 * b + 0.25 * c for a, b, c in zip(start, bend, end, strict=True)]
    assert half == pytest.approx(middle)
    assert clip((0, 0), (20, 10), (100, 0)) == (10, 0) and clip((0, 0), (20, 10), (0, -50)) == (0, -5)
    assert clip((0, 0), (20, 10), (100, 100)) == (5, 5) and clip((0, 0), (20, 20), (30, 40), True) == (6, 8)
    assert clip((0, 0), (20, 10), (1, 1)) == (0, 0)


def test_nothing_lies_on_a_line_if_there_is_room():
    at = np.array([[0.0, 0.0], [300.0, 0.0], [150.0, 3.0], [100.0, -4.0]])
    moved = apart(at, np.array([[60.0, 20.0]] * 4), [(0, 1)])
    a, b = moved[0], moved[1]
    for x, y in moved[2:]:
        line = a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0])
        assert abs(y - line) >= 10


@pytest.mark.parametrize("label", [(400, 255), (300, 300), (520, 240), (450, 330), (330, 262)])
def test_no_arrow_hides_behind_its_node(label):
    one, two = Box(["a"], 200, 36, 230, 20), Box(["b"], 220, 36, 420, 300)
    box = Box(["to"], 60, 16, *label)
    start, bend, end = _curve(one, box, two)
    for node, (a, b, c) in ((two, (start, bend, end)), (one, (end, bend, start))):
        for t in np.linspace(0.5, 0.98, 40):
            x, y = ((1 - t) ** 2 * p + 2 * t * (1 - t) * q + t**2 * r for p, q, r in zip(a, b, c, strict=True))
            assert abs(x - node.x) > node.width / 2 - 2 or abs(y - node.y) > node.height / 2 - 2
