from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.graph import GraphError, LoadReport
from ragkit.graph.kg_text import MARK, read_kg_text, write_kg_text
from ragkit.graph.names import Names

SPACES = "".join(chr(code) for code in range(0x110000) if chr(code).isspace())
NAMES = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(',"\n\r \t\ufeff'), min_size=1)
NAMES = NAMES.filter(lambda name: name.strip())


@pytest.fixture
def read(tmp_path):
    """read(content, block=...) -> (triples, line numbers, report)."""

    def run(content: str | bytes, block: int = 1 << 20) -> tuple[list[tuple[str, str, str]], list[int], LoadReport]:
        return read_in(tmp_path, content, block)

    return run


def read_in(
    folder: Path, content: str | bytes, block: int
) -> tuple[list[tuple[str, str, str]], list[int], LoadReport]:
    path = folder / "kg.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    report = LoadReport()
    ends, relations, numbers = read_kg_text(path, report, block)
    ends = ends.to_pylist()
    return list(zip(ends[::2], relations.to_pylist(), ends[1::2], strict=True)), numbers.tolist(), report


def v1_triples(content: bytes) -> list[tuple[int, list[str]]]:
    """GFM-RAG v1's reading, with line numbers: text mode, strip, split, three or nothing."""
    lines = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
    parts = [(number, line.strip().split(",")) for number, line in enumerate(lines, start=1)]
    return [(number, values) for number, values in parts if len(values) == 3]


def test_plain_lines(read):
    triples, numbers, report = read("a,r,b\nnan,null,NA\nnone,r,北京")
    assert triples == [("a", "r", "b"), ("nan", "null", "NA"), ("none", "r", "北京")]
    assert numbers == [1, 2, 3] and report.rows == 3 and report.ok


def test_rows_that_cannot_be_used_are_counted_and_shown(read):
    triples, numbers, report = read("a,r,b\nonly two,fields\n\n  \na,b,c,d\nx,y,z\nword\n")
    assert triples == [("a", "r", "b"), ("x", "y", "z")] and numbers == [1, 6]
    assert report.rows == 5 and report.blank == 2 and report.num_skipped == 3
    assert report.reasons == {"2 values, expected 3": 1, "4 values, expected 3": 1, "1 values, expected 3": 1}
    assert [str(row) for row in report.skipped] == [
        "line 2: 2 values, expected 3: 'only two,fields'",
        "line 5: 4 values, expected 3: 'a,b,c,d'",
        "line 7: 1 values, expected 3: 'word'",
    ]


def test_lines_are_stripped_as_v1_does(read):
    lines = [f"{space}a, r ,b{space}" for space in SPACES if space not in "\n\r"]
    triples, _, report = read("\n".join(lines))
    assert triples == [("a", " r ", "b")] * len(lines) and report.ok


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_byte_order_mark(read, end, block):
    content = b"\xef\xbb\xbf" + end.join(["é,r,b", "bad", "c,s,d"]).encode()
    triples, numbers, report = read(content, block)
    assert triples == [("é", "r", "b"), ("c", "s", "d")] and numbers == [1, 3]
    assert report.skipped[0].number == 2
    assert read(content + end.encode(), block)[:2] == (triples, numbers)


def test_quotes_are_letters_in_an_unmarked_file(read):
    triples, _, report = read('"a" is,b,c\n"a,b",c\n"q",r,"t"\n')
    assert triples == [('"a" is', "b", "c"), ('"a', 'b"', "c"), ('"q"', "r", '"t"')]
    assert report.ok and report.quoted == 0


def test_an_unmarked_line_of_another_length_is_tried_as_csv(read):
    triples, numbers, report = read('"Paris, France",capital of,"the ""Hexagon"""\n"open,a,b,c\nx,"y"z,"w,v"\n')
    assert triples == [("Paris, France", "capital of", 'the "Hexagon"')] and numbers == [1]
    assert report.quoted == 1 and report.num_skipped == 2


def test_a_huge_line(read):
    name = "x" * 3_000_000
    triples, numbers, report = read(f"a,r,b\n{name},r,{name}\n{name}\nc,r,d\n", block=1 << 16)
    assert triples == [("a", "r", "b"), (name, "r", name), ("c", "r", "d")] and numbers == [1, 2, 4]
    assert len(report.skipped[0].text) < 100


@pytest.mark.parametrize("block", [4, 1000])
def test_bad_utf8_names_file_and_line(read, tmp_path, block):
    with pytest.raises(GraphError, match=r"kg\.txt, line 3: not UTF-8 \(byte 0xff\); convert the file first"):
        read(b"a,r,b\n\xc3\xa9,r,b\nc,r,\xff\nd,r,e\n", block)
    with pytest.raises(GraphError, match="line 2: not UTF-8"):
        read(b"a,r,b\nc,r,\xc3", block)  # cut within a letter


def test_files_that_cannot_be_read(read, tmp_path):
    with pytest.raises(GraphError, match=r"kg\.txt is empty: expected a line head,relation,tail"):
        read(b"")
    with pytest.raises(GraphError, match=r"kg\.txt is UTF-16, expected UTF-8"):
        read("a,r,b\n".encode("utf-16"))
    with pytest.raises(GraphError, match=r"nothing\.txt: no such file"):
        read_kg_text(tmp_path / "nothing.txt", LoadReport())
    assert read(b"\xef\xbb\xbf")[0] == [] and read(b"\n\n\n")[2].blank == 3


def test_a_marked_file(read):
    content = MARK.decode() + '"a,b",r,c\nplain,r,c\n"two\nlines",r,"say ""x"""\n" e",r,f\nbad\nlast,r,g'
    for block in (1, 5, 1000):
        triples, numbers, report = read(content, block)
        assert triples == [
            ("a,b", "r", "c"),
            ("plain", "r", "c"),
            ("two\nlines", "r", 'say "x"'),
            (" e", "r", "f"),
            ("last", "r", "g"),
        ]
        assert numbers == [2, 3, 4, 6, 8] and report.quoted == 0
        assert [str(row) for row in report.skipped] == ["line 7: 1 values, expected 3: 'bad'"]


def test_a_quote_that_is_never_closed_is_reported(read):
    triples, numbers, report = read(MARK.decode() + 'a,r,b\n"open,r,c\nd,r,e\n')
    assert triples == [("a", "r", "b")]
    assert str(report.skipped[0]) == "line 3: quotes that do not match: '\"open,r,c\\nd,r,e'"


@given(
    st.text(st.sampled_from("ab,,,\n\n\r é\u3000\u2028\t\x1c\x0b北") | st.characters(exclude_categories=["Cs"])),
    st.integers(1, 9),
)
def test_reads_what_v1_reads(tmp_path_factory, text, block):
    content = ("x,r,y\n" + text.replace('"', "")).encode()
    triples, numbers, report = read_in(tmp_path_factory.mktemp("kg", numbered=True), content, block)
    assert [(number, list(triple)) for number, triple in zip(numbers, triples, strict=True)] == v1_triples(content)
    lines = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").readlines()
    assert report.rows + report.blank == len(lines)
    assert report.num_skipped == report.rows - len(triples)


@given(st.lists(NAMES, min_size=1, max_size=6, unique=True), st.data(), st.integers(1, 40))
def test_any_names_survive_writer_and_reader(tmp_path_factory, names, data, block):
    places = st.integers(0, len(names) - 1)
    rows = data.draw(st.lists(st.tuples(places, places, places), min_size=1, max_size=8))
    head, relation, tail = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    file = io.BytesIO()
    marked = write_kg_text(file, Names(names), Names(names), head, relation, tail)
    folder = tmp_path_factory.mktemp("kg", numbered=True)
    triples, _, report = read_in(folder, file.getvalue(), block)
    assert triples == [(names[h], names[r], names[t]) for h, r, t in rows]
    assert report.ok and report.quoted == 0 and report.blank == 0
    assert marked == file.getvalue().startswith(MARK)
    if not marked:
        assert [values for _, values in v1_triples(file.getvalue())] == [list(triple) for triple in triples]


def test_without_need_there_is_no_mark():
    file = io.BytesIO()
    ids = np.array([0], np.int32)
    assert not write_kg_text(file, Names(['say "x"']), Names(["r"]), ids, ids, ids)
    assert file.getvalue() == b'say "x",r,say "x"\n'
