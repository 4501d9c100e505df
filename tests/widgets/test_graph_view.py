"""The graph view without a front end: what its inputs do, and what it says where there is nothing to show."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from IPython.core.formatters import DisplayFormatter

from ragkit.gfm import GFMRetriever, GFMSettings, GNNRetriever, embed_relations
from ragkit.graph import KnowledgeGraph
from ragkit.graph.link import EntityLinker
from ragkit.widgets import GraphView
from ragkit.widgets import graph_view as module
from ragkit.widgets.base import widgets

QUESTION = "Which country borders peru?"
TEXTS = {
    "Peru": "Lima is in Peru.",
    "Chile": "Chile borders Peru.",
    "Santiago": "Santiago is in Chile.",
    "X": "Alone.",
}


class Letters:
    """Embeds a text as its letter counts."""

    name = "letters"

    def encode(self, texts, side):
        rows = [[text.count(letter) + (side == "query") for letter in "abcdefgh"] for text in texts]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(texts), 8)


@pytest.fixture(scope="module")
def graph():
    return KnowledgeGraph.from_triples(
        [
            ("lima", "capital of", "peru"),
            ("peru", "borders", "chile"),
            ("santiago", "capital of", "chile"),
            ("santiago", "near", "valparaiso"),
            ("island", "near", "reef"),
        ],
        {
            "Peru": ["peru", "lima", "chile"],
            "Chile": ["chile", "peru"],
            "Santiago": ["santiago", "chile"],
            "X": ["reef"],
        },
    )


@pytest.fixture(scope="module")
def retriever(graph):
    torch.manual_seed(3)
    model = GNNRetriever(GFMSettings(rel_emb_dim=8, input_dim=6, hidden_dims=[6, 6])).eval()
    encoder = Letters()
    embed_relations(graph, encoder, cache=False)
    rows = [{"id": name, "text": text} for name, text in TEXTS.items()]
    linker = EntityLinker(graph)  # names only
    return GFMRetriever(model, graph, encoder, rows, linker, ranker="score_weighted_idf", cache=False)


@pytest.fixture
def view(retriever):
    return GraphView(retriever, QUESTION)


def shown(view):
    return {node.name for node in view.neighbourhood.nodes}


# ---- what it shows ----


def test_it_shows_picture_tables_and_targets(view):
    assert view.message == "" and view.status.value == ""
    assert shown(view) >= {"peru", "lima", "chile", "santiago"}
    assert "<svg" in view.picture.value and "var(--jp-ui-font-color1" in view.picture.value
    for words in ("Best entities", "Best documents", "Paths to"):
        assert words in view.tables.value
    assert view.table.value.count("<tr>") == 1 + len(view.neighbourhood.nodes)
    kinds = [value[0] for _, value in view.target.options if value]
    assert {"entity", "document"} == set(kinds) and view.target.value[0] == "entity"
    assert view.target.value[1] == view.neighbourhood.explanation.target != "peru"


def test_every_input_changes_what_is_shown(view):
    all_of_it = shown(view)
    view.nodes.value = 5
    assert len(view.neighbourhood.nodes) == 5 and len(all_of_it) > 5
    view.nodes.value = 40
    view.hops.value = 1
    assert view.neighbourhood.hops == 1
    view.paths.value = 1
    assert len(view.neighbourhood.explanation.paths) <= 1
    view.paths_only.value = True
    assert all(node.role != "other" for node in view.neighbourhood.nodes)
    view.paths_only.value = False
    document = next(value for _, value in view.target.options if value and value[0] == "document")
    view.target.value = document
    assert view.neighbourhood.explanation.target_kind == "document"
    view.target.value = None
    assert view.neighbourhood.explanation is None
    view.question.value = "Is santiago in chile?"
    assert {n.name for n in view.neighbourhood.nodes if n.role == "question"} == {"santiago", "chile"}
    view.entities.value = "lima; peru"
    assert [n.name for n in view.neighbourhood.nodes if n.role == "question"] == ["lima", "peru"]


def test_numbers_do_not_ask_the_model_again(view, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "scores_of", lambda *a: calls.append("scores"))
    monkeypatch.setattr(module, "explained", lambda *a: calls.append("paths"))
    view.nodes.value, view.hops.value, view.paths_only.value = 6, 1, True
    assert calls == [] and view.message == ""
    view.paths.value = 3
    assert calls == ["paths"]


def test_a_graph_alone(graph):
    view = GraphView(graph, entities=["peru", graph.entities.index("lima")])
    assert view.entities.value == "peru; lima" and shown(view) == {"peru", "lima", "chile", "santiago"}
    assert view.question not in view.children and view.target not in view.children
    view.entities.value = "reef"
    assert shown(view) == {"reef", "island"}


def test_the_first_target_may_be_named(retriever):
    view = GraphView(retriever, QUESTION, target="Santiago")
    assert view.neighbourhood.explanation.target == "Santiago"
    view.question.value = "Is santiago in chile?"
    assert view.target.options[0][1][0] == "entity"  # only for the first question


# ---- what it says ----


def test_what_is_wrong_is_said_and_clears_the_picture(view):
    for change, words in (
        (("question", "  "), "question: it is empty"),
        (("question", "Who is it?"), "no entity of the graph was found in &#x27;Who is it?&#x27;"),
        (("entities", "perru"), "the graph has no entity &#x27;perru&#x27;"),
    ):
        getattr(view, change[0]).value = change[1]
        assert words in view.status.value and 'role="alert"' in view.status.value
        assert view.picture.value == view.tables.value == "" and view.neighbourhood is None
        assert view.target.options == (("nothing", None),)
        assert view.static_text() == view.message and "alert" in view.static_html()
        with pytest.raises(ValueError, match="there is no picture"):
            view.svg()
        view.question.value, view.entities.value = QUESTION, ""
        assert view.status.value == "" and view.neighbourhood is not None


def test_a_target_without_a_path_says_so(retriever):
    view = GraphView(retriever, QUESTION, target="reef")
    assert view.message == "" and "No path" in view.picture.value
    assert "reef" in shown(view) and "peru" in shown(view)
    assert "No path" in view.static_text() and "No path" in view.static_html()


def test_a_target_that_is_not_in_the_graph(retriever):
    view = GraphView(retriever, QUESTION, target="nowhere")
    assert "no entity or document 'nowhere'" in view.message
    view.target.value = view.target.options[1][1]
    assert view.message == "" and view.neighbourhood is not None


def test_no_exception_leaves_a_callback(view, monkeypatch):
    def broken(*args, **options):
        raise KeyError("odd")

    monkeypatch.setattr(module, "around", broken)
    view.nodes.value = 7
    assert view.message == "this did not work: KeyError: 'odd'"


def test_an_empty_view_says_what_to_do(retriever, graph):
    assert "write one that names an entity" in GraphView(retriever).message
    assert "name at least one entity" in GraphView(graph).message
    assert "expected a name or an id" not in GraphView(graph, entities=[0]).message


def test_other_sources_are_refused():
    with pytest.raises(TypeError, match="expected a GFMRetriever or a KnowledgeGraph, found a str"):
        GraphView("small_world")


# ---- files and the static form ----


def test_the_buttons_write_files(view, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    view.file.value = "pictures/peru"
    view.svg_button.click()
    assert (tmp_path / "pictures/peru.svg").read_text(encoding="utf-8") == view.svg()
    assert "saved as pictures/peru.svg" in view.saved.value and 'role="status"' in view.saved.value
    view.file.value = "peru.png"
    view.png_button.click()
    assert (tmp_path / "peru.png").read_bytes() == view.png()
    view.file.value = " "
    view.svg_button.click()
    assert "File name is empty" in view.saved.value
    view.file.value = "peru.png/x"  # a file where a folder should be
    view.svg_button.click()
    assert "not saved" in view.saved.value
    view.question.value = ""
    view.file.value = "a"
    view.svg_button.click()
    assert "there is no picture" in view.saved.value and not (tmp_path / "a.svg").exists()


def test_the_static_form_is_a_picture_and_tables_and_always_the_same(view, retriever):
    bundle, _ = DisplayFormatter().format(view)
    html, text = bundle["text/html"], bundle["text/plain"]
    data = re.search(r'<img src="data:image/svg\+xml;base64,([^"]+)" alt="([^"]+)"', html)
    root = ET.fromstring(base64.b64decode(data.group(1)))
    assert root.get("role") == "img" and "peru" in data.group(2)
    assert html.count("<table>") == 4 and "<svg" not in html
    for words in (QUESTION, "Best entities", "Best documents", "Paths to", "In the picture"):
        assert words in text
    again = GraphView(retriever, QUESTION)
    assert (again.static_html(), again.static_text()) == (html, text)


def test_inputs_are_named_and_in_order(view):
    order = [type(child).__name__ for child in view.children[:7]]
    assert order == ["Text", "Text", "Dropdown", "BoundedIntText", "BoundedIntText", "BoundedIntText", "Checkbox"]
    assert all(child.description for child in view.children[:7])
    assert isinstance(view, widgets.VBox)
