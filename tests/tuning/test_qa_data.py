"""Every layout of the same rows reads the same; everything wrong is named."""

from __future__ import annotations

import json

import pytest

from ragkit.tuning.qa_data import DataError, QAData, QAExample, load_qa

ROWS = [
    {"id": "a", "question": "Where is the Louvre?", "answer": "Paris", "supporting_facts": ["Louvre"]},
    {"id": "b", "question": "Where is the Prado?", "answer": "Madrid", "supporting_facts": ["Prado", "Madrid [2]"]},
]
WANTED = [
    QAExample("a", "Where is the Louvre?", ("Paris",), ("Louvre",)),
    QAExample("b", "Where is the Prado?", ("Madrid",), ("Prado", "Madrid [2]")),
]


def columns_of(rows):
    return {key: [row[key] for row in rows] for key in rows[0]}


def layouts(tmp_path):
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    folder = tmp_path / "set"
    (folder / "raw").mkdir(parents=True)
    (folder / "raw" / "train.json").write_text(json.dumps(ROWS))
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    columns = tmp_path / "columns.json"
    columns.write_text(json.dumps(columns_of(ROWS)))
    return {
        "list of dicts": ROWS,
        "dict of columns": columns_of(ROWS),
        "list with one dict of columns": [columns_of(ROWS)],
        "two dicts of columns": [columns_of(ROWS[:1]), columns_of(ROWS[1:])],
        "GFM-RAG folder": folder,
        "JSONL": str(lines),
        "JSON of columns": columns,
        "Dataset": datasets.Dataset.from_list(ROWS),
        "DatasetDict": datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
        "DataFrame": pandas.DataFrame(ROWS),
    }


def test_all_layouts_read_the_same(tmp_path):
    for name, source in layouts(tmp_path).items():
        data = load_qa(source)
        assert list(data) == WANTED, name
        assert data.skipped == [] and "2 questions" in repr(data)


def test_fedrag_quick_start_as_written():
    train_dataset = [
        {
            "query": ["What is the capital of France?", "Who wrote Hamlet?"],
            "response": ["Paris", "William Shakespeare"],
        }
    ]
    data = load_qa(train_dataset)
    assert [(example.id, example.question, example.answer) for example in data] == [
        ("0", "What is the capital of France?", "Paris"),
        ("1", "Who wrote Hamlet?", "William Shakespeare"),
    ]


def test_answers_aliases_metadata_and_numbers():
    (example,) = load_qa([{"query": "How many?", "answer": [7, "seven"], "answer_aliases": ["VII", "7"], "hops": 2}])
    assert example.answers == ("7", "seven", "VII") and example.answer == "7"
    assert example.metadata == {"hops": 2} and example.supporting == ()


def test_own_column_names_and_slices():
    data = load_qa([{"frage": "Wo?", "antwort": "Hier"}] * 3, columns={"question": "frage", "answer": "antwort"})
    assert data[1].question == "Wo?" and isinstance(data[:2], QAData) and len(data[:2]) == 2
    assert load_qa(data) is data
    assert list(load_qa(list(data))) == list(data)


def test_empty_rows_are_skipped_named_and_printed(capsys):
    rows = [{"question": " ", "answer": None}, *ROWS, {"question": None, "answer": "Oslo"}]
    data = load_qa(rows)
    assert list(data) == WANTED
    assert data.skipped == [(0, "empty row"), (3, "no question")]
    assert "skipped 2 of 4 rows (row 0: empty row; row 3: no question)" in capsys.readouterr().out
    assert "2 rows skipped" in repr(data)


def test_a_question_without_answer_stays():
    pandas = pytest.importorskip("pandas")
    data = load_qa(pandas.DataFrame([{"question": "Where?", "answer": float("nan")}, ROWS[0]]))
    assert data[0].answers == () and data[0].answer == ""
    assert "1 without an answer" in repr(data)


def test_split_of_a_folder(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "test.json").write_text(json.dumps(ROWS[:1]))
    assert len(load_qa(tmp_path, split="test")) == 1
    with pytest.raises(DataError, match=r"train\.json: no such file; the splits there are: test"):
        load_qa(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no rows"),
        ([{"question": "", "answer": ""}], r"all 1 rows are empty \(row 0: empty row\)"),
        ([{"question": "Q"}], r"no column for the answer \(looked for 'answer' or 'response'"),
        ([{"questoin": "Q", "answer": "A"}], r"no column for the question .*did you mean 'questoin'\?"),
        ({"query": ["a", "b"], "response": ["x"]}, r"different lengths \(query: 2, response: 1\)"),
        ([{"query": ["a", "b"], "response": ["x"]}], "different lengths"),
        ({"query": ["a", "b"], "response": "x"}, "column 'response' is not a list"),
        ([{"question": "Q", "answer": {"text": ["A"]}}], r"row 0, field 'answer': expected text, found dict"),
        ([{"question": True, "answer": "A"}], "row 0, field 'question': expected text, found bool"),
        (["Q"], "row 0: expected a dict, found str"),
        ([{"id": "x", "question": "Q", "answer": "A"}] * 2, "rows 0 and 1 have the same id 'x'"),
        ("nowhere.jsonl", "nowhere.jsonl: no such file"),
        (17, "cannot read questions from a int"),
    ],
)
def test_wrong_data_is_named(source, message):
    with pytest.raises(DataError, match=message):
        load_qa(source)


def test_wrong_columns_argument_is_named():
    with pytest.raises(DataError, match=r"unknown field 'questions' \(did you mean 'question'\?\)"):
        load_qa(ROWS, columns={"questions": "question"})
    with pytest.raises(DataError, match=r"no column 'quest' \(asked for as question\)"):
        load_qa(ROWS, columns={"question": "quest"})


def test_broken_files_name_file_and_line(tmp_path):
    lines = tmp_path / "rows.jsonl"
    lines.write_text(json.dumps(ROWS[0]) + '\n{"question": ')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: not valid JSON"):
        load_qa(lines)
    lines.write_text("\n" + json.dumps(ROWS[0]) + '\n\n{"question": 3, "answer": {}}')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 4, field 'answer': expected text, found dict"):
        load_qa(lines)
    lines.write_text("\n" + '{"question": "Q", "answer": "A", "id": 7}\n\n' * 2)
    with pytest.raises(DataError, match=r"rows\.jsonl: lines 2 and 4 have the same id '7'"):
        load_qa(lines)
    lines.write_text('{"question": ["Q", "R"], "answer": ["A", true]}\n')  # columns: its rows are no lines
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1, field 'answer': expected text, found bool"):
        load_qa(lines)
    text = tmp_path / "rows.json"
    text.write_text('"hello"')
    with pytest.raises(DataError, match="expected a JSON list of rows or an object of columns, found str"):
        load_qa(text)
