"""kg.txt: one `head,relation,tail` a line.

GFM-RAG v1 knows no quotes: a line is stripped at its ends and split at commas, and must give three values. So
`"A" is,b,c` has the head `"A" is`, quotes and all, and a value with a comma cannot be written. Our writer keeps to
that form whenever it can. Where a value holds a comma, a line break or white space at its ends, it writes the line
`MARK` first (v1 skips it: it has one value only) and then CSV, with quotes round the values that need them. The reader
follows the mark: with it, quotes are CSV's; without it they are letters. Only a line that does not split into three
values is tried again as CSV, so that hand-made files with `"Paris, France",capital of,x` work; such lines are counted.

The reader works on blocks of bytes with numpy; Python sees only the lines that are unusual.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ragkit.graph.names import Names, joined
from ragkit.graph.report import GraphError, LoadReport

MARK = b"# ragkit: quoted values\n"
BLOCK = 32 << 20  # bytes read at a time
ROWS = 1 << 20  # triples written at a time
# What str.strip, and so v1, takes off a line's ends; RE2's own classes know ASCII only.
SPACE = r"[\t-\r\x1c-\x20\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
NEEDS_MARK = rf"[,\n\r]|^{SPACE}|{SPACE}$"
NEWLINE, COMMA, QUOTE = 10, 44, 34
_SPACE = np.isin(np.arange(256), [9, 10, 11, 12, 13, 28, 29, 30, 31, 32])  # the ASCII part of str.isspace
_VALUE = re.compile(r'\s*"((?:[^"]|"")*)"\s*(?:,|\Z)|([^",]*)(?:,|\Z)')


def read_kg_text(
    path: Path, report: LoadReport, block_bytes: int = BLOCK
) -> tuple[pa.ChunkedArray, pa.ChunkedArray, np.ndarray]:
    """Reads a kg.txt, marked or not.

    Args:
        path: The file; UTF-8, with or without a byte order mark, any line ends.
        report: Gets the lines that cannot be used.
        block_bytes: Bytes read at a time; a longer line is read whole all the same.

    Returns:
        (ends [2T] large_string: head 0, tail 0, ...; relations [T] large_string; line numbers [T] int64, from 1).
        A value may be empty: `parts.encode_triples` reports that, with the names that are blank for other reasons.

    Raises:
        GraphError: The file is missing, empty or not UTF-8.
    """
    if not path.is_file():
        raise GraphError(f"{path}: no such file")
    ends: list[pa.Array] = []
    relations: list[pa.Array] = []
    numbers: list[np.ndarray] = []
    with path.open("rb") as file:
        first = file.read(len(MARK) + 4)
        if not first:
            raise GraphError(f"{path} is empty: expected a line head,relation,tail for each triple")
        if first.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise GraphError(f"{path} is UTF-16, expected UTF-8; convert it first")
        start = 3 if first.startswith(b"\xef\xbb\xbf") else 0
        mark = re.match(rb"# ragkit: quoted values\r?\n", first[start:])
        file.seek(start + (mark.end() if mark else 0))
        line = 2 if mark else 1
        for block in _blocks(file, bool(mark), block_bytes):
            _check_utf8(block, path, line)
            values, rows, lines = _split(block, line, bool(mark), report)
            if len(rows):
                places = np.arange(len(rows), dtype=np.int64)[:, None] * 3
                ends.append(values.take(pa.array((places + [0, 2]).reshape(-1))))
                relations.append(values.take(pa.array(places[:, 0] + 1)))
                numbers.append(rows)
            line += lines
    return (
        pa.chunked_array(ends, pa.large_string()),
        pa.chunked_array(relations, pa.large_string()),
        np.concatenate(numbers) if numbers else np.zeros(0, np.int64),
    )


def _blocks(file: BinaryIO, quotes: bool, size: int) -> Iterator[bytes]:
    """Blocks of whole lines, each with a line end after the last. With `quotes` a break inside quotes ends no line."""
    carry = b""
    while True:
        block = file.read(size)
        last = not block
        block = carry + block
        if not block:
            return
        if not quotes:  # as Python's text mode, and so v1, has it; a "\r" at the end may be half a line end
            held = b"\r" if block.endswith(b"\r") and not last else b""
            block = block[: len(block) - len(held)]
            if b"\r" in block:
                block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            cut = block.rfind(b"\n") + 1
        else:
            held = b""
            cut = _last_end_outside_quotes(block)
        if last:
            yield block if block.endswith(b"\n") else block + b"\n"
            return
        if cut:
            yield block[:cut]
        carry = block[cut:] + held


def _last_end_outside_quotes(block: bytes) -> int:
    buffer = np.frombuffer(block, np.uint8)
    breaks = np.flatnonzero(buffer == NEWLINE)
    outside = breaks[np.searchsorted(np.flatnonzero(buffer == QUOTE), breaks) % 2 == 0]
    return int(outside[-1]) + 1 if len(outside) else 0


def _check_utf8(block: bytes, path: Path, line: int) -> None:
    if block.isascii():
        return
    try:
        block.decode("utf-8")
    except UnicodeDecodeError as error:
        at = line + block.count(b"\n", 0, error.start)
        raise GraphError(
            f"{path}, line {at}: not UTF-8 (byte 0x{block[error.start]:02x}); convert the file first"
        ) from error


def _split(block: bytes, line: int, quotes: bool, report: LoadReport) -> tuple[pa.Array, np.ndarray, int]:
    """One block -> (values [3 rows] large_string, line of each row, number of lines in the block)."""
    buffer = np.frombuffer(block, np.uint8)
    breaks = buffer == NEWLINE
    cuts = np.flatnonzero(breaks | (buffer == COMMA))  # where values end
    lines = int(np.count_nonzero(breaks))
    marks = np.flatnonzero(buffer == QUOTE) if quotes else np.zeros(0, np.int64)
    if len(marks):
        cuts = cuts[np.searchsorted(marks, cuts) % 2 == 0]
        if not len(cuts) or cuts[-1] != len(buffer) - 1:  # a quote is open at the end of the file
            cuts = np.append(cuts, len(buffer) - 1)
    last = np.flatnonzero(breaks[cuts])  # [records] place in cuts of each record's end
    stops = cuts[last]
    starts = np.concatenate([[0], stops[:-1] + 1])
    good = np.diff(last, prepend=-1) == 3
    good &= ~_SPACE[buffer[starts]] & ~_SPACE[buffer[np.maximum(stops - 1, 0)]]
    if len(marks):
        good[np.searchsorted(stops, marks)] = False
    values = _good_values(buffer, cuts, last, starts, stops, good)
    if not block.isascii():
        values = _strip_ends(values)
    rows = np.flatnonzero(good)
    odd = np.flatnonzero(~good)
    inner = len(stops) != lines  # some line breaks stand inside quotes
    numbers = line + (np.cumsum(breaks)[starts] - breaks[starts] if inner else np.arange(len(stops)))
    if len(odd):
        found, found_rows = [], []
        for record in odd:
            text = block[starts[record] : stops[record]].decode("utf-8")
            triple = _odd_line(text, int(numbers[record]), quotes, report)
            if triple:
                found += triple
                found_rows.append(record)
        if found:
            rows = np.concatenate([rows, np.asarray(found_rows, np.int64)])
            values = pa.concat_arrays([values, pa.array(found, pa.large_string())])
            order = np.argsort(rows, kind="stable")
            rows = rows[order]
            values = values.take(pa.array((order[:, None] * 3 + np.arange(3)).reshape(-1)))
    report.rows += int(good.sum())
    return values, numbers[rows].astype(np.int64), lines


def _good_values(
    buffer: np.ndarray, cuts: np.ndarray, last: np.ndarray, starts: np.ndarray, stops: np.ndarray, good: np.ndarray
) -> pa.Array:
    """The values of the good records, three each: their bytes moved together, and offsets."""
    keep = np.ones(len(buffer), bool)
    keep[cuts] = False
    for record in np.flatnonzero(~good):
        keep[starts[record] : stops[record]] = False
    lengths = np.diff(cuts, prepend=-1) - 1
    if not good.all():
        lengths = lengths[(last[good][:, None] + np.arange(-2, 1)).reshape(-1)]
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    data = buffer[keep]
    return pa.LargeStringArray.from_buffers(len(lengths), pa.py_buffer(offsets), pa.py_buffer(data))


def _strip_ends(values: pa.Array) -> pa.Array:
    """Takes white space beyond ASCII off each line's ends, as `str.strip` in v1 does."""
    count = len(values) // 3
    places = np.arange(count, dtype=np.int64) * 3
    heads = pc.utf8_ltrim_whitespace(values.take(pa.array(places)))
    tails = pc.utf8_rtrim_whitespace(values.take(pa.array(places + 2)))
    together = pa.concat_arrays([heads, values.take(pa.array(places + 1)), tails])
    return together.take(pa.array(np.arange(3 * count).reshape(3, count).T.reshape(-1)))


def _odd_line(text: str, number: int, quotes: bool, report: LoadReport) -> list[str] | None:
    """The three values of a line that is blank, quoted, indented or wrong; None (and an entry) if it has not three."""
    if not text.strip():
        report.blank += 1
        return None
    report.rows += 1
    plain = text.strip().split(",")
    if len(plain) == 3 and not (quotes and '"' in text):
        return plain
    values = _csv_values(text)
    if values is None and quotes and '"' in text:
        report.skip(number, "quotes that do not match", text)
        return None
    if values is not None and len(values) == 3:
        report.quoted += not quotes
        return values
    report.skip(number, f"{len(values or plain)} values, expected 3", text)
    return None


def _csv_values(text: str) -> list[str] | None:
    """The values of a line of CSV; None where it has no quotes or they do not match."""
    text = text.rstrip("\r")
    if '"' not in text:
        return None
    values: list[str] = []
    at = 0
    while at <= len(text):
        match = _VALUE.match(text, at)
        if not match:
            return None
        values.append(match[1].replace('""', '"') if match[1] is not None else match[2])
        if match.end() == len(text) and not match[0].endswith(","):
            return values
        at = match.end()
    return values


def write_kg_text(
    file: BinaryIO, entities: Names, relations: Names, head: np.ndarray, relation: np.ndarray, tail: np.ndarray
) -> bool:
    """Writes triples as kg.txt.

    Args:
        file: Open for bytes.
        entities: N names.
        relations: R names.
        head: [T] int32 entity ids; `relation` [T] relation ids, `tail` [T] entity ids.

    Returns:
        Whether the file had to be marked: GFM-RAG v1 cannot read all of it.
    """
    marked = any(pc.any(pc.match_substring_regex(names.array, NEEDS_MARK)).as_py() for names in (entities, relations))
    marked = marked or _begins_like_a_bom(entities, head)
    if marked:
        file.write(MARK)
    entity_values = quoted(entities.array) if marked else entities.array
    relation_values = quoted(relations.array) if marked else relations.array
    last_values = joined(entity_values, "\n")
    for start in range(0, len(head), ROWS):
        part = slice(start, start + ROWS)
        lines = joined(
            entity_values.take(pa.array(head[part])),
            relation_values.take(pa.array(relation[part])),
            last_values.take(pa.array(tail[part])),
            by=",",
        )
        _, offsets, data = lines.buffers()
        file.write(memoryview(data)[: int(np.frombuffer(offsets, np.int64, len(lines) + 1)[-1])])
    return marked


def _begins_like_a_bom(entities: Names, head: np.ndarray) -> bool:
    """Whether the first head begins with U+FEFF, which at the start of a file is a byte order mark."""
    return len(head) > 0 and entities[int(head[0])].startswith("\ufeff")


def quoted(values: pa.Array) -> pa.Array:
    """CSV quotes round the values that need them."""
    need = pc.match_substring_regex(values, NEEDS_MARK + '|"|^\ufeff')
    escaped = pc.replace_substring(values, '"', '""')
    return pc.if_else(need, joined('"', escaped, '"'), values)
