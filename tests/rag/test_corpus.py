"""Corpora from every form that is promised, and errors that name the row and the id."""

from __future__ import annotations

import json

import pytest

from ragkit.rag.corpus import CorpusError, Passage, RetrievedPassage, load_corpus

EXPECTED = [Passage("Lima", "Lima is in Peru.", "Lima"), Passage("Lima [2]", "Lima is a bean.", "Lima")]
BY_TITLE = {"Lima": "Lima is in Peru.", "Lima [2]": "Lima is a bean."}
ROWS = [
    {"id": "Lima", "title": "Lima", "text": "Lima is in Peru."},
    {"id": "Lima [2]", "title": "Lima", "text": "Lima is a bean."},
]


def test_full_text_is_title_newline_text():
    assert EXPECTED[1].full_text == "Lima\nLima is a bean."
    assert Passage("a", "Only text.").full_text == "Only text."


def test_a_retrieved_passage_is_a_passage_with_a_score():
    found = RetrievedPassage.of(Passage("a", "text", "title", {"page": 3}), 0.5)
    assert (found.id, found.text, found.title, found.metadata, found.score) == ("a", "text", "title", {"page": 3}, 0.5)
    assert isinstance(found, Passage) and hash(found)


def test_dict_and_rows():
    assert load_corpus(BY_TITLE) == EXPECTED
    assert load_corpus(ROWS) == EXPECTED
    assert load_corpus(EXPECTED) == EXPECTED
    assert load_corpus(iter(ROWS)) == EXPECTED


def test_texts_get_their_row_number_as_id():
    assert load_corpus(["one", "two"]) == [Passage("0", "one"), Passage("1", "two")]


def test_ids_titles_and_metadata_of_rows():
    rows = [{"text": "a"}, {"title": "T", "contents": "b", "page": 3}, {"_id": 7, "text": "c", "metadata": {"x": 1}}]
    assert load_corpus(rows) == [
        Passage("0", "a"),
        Passage("T", "b", "T", {"page": 3}),
        Passage("7", "c", "", {"x": 1}),
    ]


def test_files(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "dataset_corpus.json").write_text(json.dumps(BY_TITLE), encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8-sig")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    for source in (tmp_path, tmp_path / "raw", tmp_path / "raw" / "dataset_corpus.json", str(tmp_path / "rows.jsonl")):
        assert load_corpus(source) == EXPECTED
    assert load_corpus(tmp_path / "rows.json") == EXPECTED


def test_datasets_and_pandas():
    import datasets
    import pandas

    assert load_corpus(datasets.Dataset.from_list(ROWS)) == EXPECTED
    assert load_corpus(pandas.DataFrame(ROWS)) == EXPECTED
    with pytest.raises(CorpusError, match="choose a split"):
        load_corpus(datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)))
    with pytest.raises(CorpusError, match="row 1 .*the text is nan"):
        load_corpus(pandas.DataFrame([{"text": "a"}, {"text": None}]).astype(object).fillna(float("nan")))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "the corpus is empty"),
        ({}, "the corpus is empty"),
        ({"Lima": " \n"}, r"row 0 \(id 'Lima'\): the passage has no text"),
        ([{"id": "a", "text": "x"}, {"id": "b", "text": ""}], r"row 1 \(id 'b'\): the passage has no text"),
        ([{"id": "a", "text": None}], r"row 0 \(id 'a'\): the text is None"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "row 1: the id 'a' is that of row 0 too"),
        ([{"id": "a", "body": "x"}], r"row 0: no field text \(found: id, body\)"),
        ([3], "row 0: expected a text or a dict"),
        ({"Lima": 3}, "key 'Lima': expected the passage's text, found int"),
        (3, "cannot be made from int"),
        ("no/such/file.json", "no corpus at"),
    ],
)
def test_errors_name_what_is_wrong(source, message):
    with pytest.raises(CorpusError, match=message):
        load_corpus(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": ""}\n', r"a.jsonl, line 3 \(id '1'\): the passage has no text"),
        (
            "a.jsonl",
            b'\n{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}',
            "line 3: the id 'a' is that of line 2 too",
        ),
        ("a.json", b'{"A": "x",\n "B"}', "a.json, line 2: not valid JSON"),
        ("a.json", b'{"A": "x", "A": "y"}', "a.json: the key 'A' stands there twice"),
        ("a.json", '{"A": "é"}'.encode("latin-1"), "a.json is not UTF-8"),
        ("a.json", b'[{"text": ""}]', r"a.json, row 0 \(id 0\)|a.json, row 0 \(id '0'\)"),
    ],
)
def test_errors_name_the_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        load_corpus(tmp_path / name)


def test_a_folder_without_a_corpus(tmp_path):
    with pytest.raises(CorpusError, match="holds no corpus: expected raw/dataset_corpus.json"):
        load_corpus(tmp_path)
