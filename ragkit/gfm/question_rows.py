"""Rows of a question file as GFM-RAG's stage 1 writes them, checked, and what could not be used of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ragkit import small_world
from ragkit.json_lines import Places, parse_json_lines

SHOWN = 5
FIELDS = ("question_entities", "supporting_entities", "supporting_facts")
V2_NAMES = {"supporting_facts": "supporting_documents"}
NOUN = {"question_entities": "question entity", "supporting_entities": "supporting entity"}


class QuestionError(ValueError):
    """Question rows that cannot be read; names the file, the row and the field."""


@dataclass(frozen=True)
class QuestionRow:
    """One checked row.

    Attributes:
        number: Its place in the file, from 0 (v1's sample_id).
        place: The same as messages count it: the line in a file of JSON lines.
        id: Its id; the number where it has none.
        question: The text.
        names: For each of `FIELDS` the names, each once.
        is_part: Whether it is marked `sub_question`.
    """

    number: int
    place: int
    id: str
    question: str
    names: dict[str, list[str]]
    is_part: bool = False


@dataclass
class QuestionReport:
    """What was left out of a question file.

    Attributes:
        source: The file.
        rows: Rows in it.
        unit: What the numbers count: "row" from 0, or "line" of a file of JSON lines, from 1.
        reasons: Reason -> number of rows that were left out for it.
        examples: (number, reason) of the first few.
        unlinked: Field -> number of its names that the graph does not have.
        unlinked_examples: (number, field, name) of the first few.
    """

    source: str
    rows: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    examples: list[tuple[int, str]] = field(default_factory=list)
    unlinked: dict[str, int] = field(default_factory=dict)
    unlinked_examples: list[tuple[int, str, str]] = field(default_factory=list)
    unit: str = "row"

    @property
    def num_skipped(self) -> int:
        """Rows that were left out."""
        return sum(self.reasons.values())

    @property
    def ok(self) -> bool:
        """Whether every row and every name could be used."""
        return not self.reasons and not self.unlinked

    def skip(self, number: int, reason: str) -> None:
        """Counts a row that is left out."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if len(self.examples) < SHOWN:
            self.examples.append((number, reason))

    def unknown(self, number: int, name_of_field: str, name: str) -> None:
        """Counts a name that the graph does not have."""
        self.unlinked[name_of_field] = self.unlinked.get(name_of_field, 0) + 1
        if len(self.unlinked_examples) < SHOWN:
            self.unlinked_examples.append((number, name_of_field, name))

    def as_json(self) -> dict[str, Any]:
        """For the cache."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> QuestionReport:
        """From `as_json`."""
        report = cls(**value)
        report.examples = [(int(number), reason) for number, reason in value["examples"]]
        report.unlinked_examples = [(int(n), name, text) for n, name, text in value["unlinked_examples"]]
        return report

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.rows - self.num_skipped:,} of {self.rows:,} questions used"]
        lines += [f"  {count:,} skipped: {reason}" for reason, count in self.reasons.items()]
        lines += [f"    {self.unit} {number}: {reason}" for number, reason in self.examples]
        lines += [f"  {count:,} {name} not in the graph" for name, count in self.unlinked.items()]
        lines += [f"    {self.unit} {number}, {name}: {text!r}" for number, name, text in self.unlinked_examples]
        return "\n".join(lines)


def read_source(source: Any, split: str) -> tuple[str, bytes]:
    """(name for messages, JSON bytes) of a question file, of a data set's folder, "small_world", or rows in memory.

    Raises:
        QuestionError: There is no such file (the message says which there are), or the rows are no JSON values.
    """
    if isinstance(source, (str, Path)):
        path = small_world.path() if str(source) == "small_world" else Path(source).expanduser()
        if path.is_dir():
            folder = next((f for f in (path / "processed" / "stage1", path / "stage1") if f.is_dir()), path)
            path = folder / f"{split}.json"
            if not path.is_file():
                found = sorted(file.stem for file in folder.glob("*.json") if file.stem != "document2entities")
                raise QuestionError(f"{path}: no such file; the splits there are: {', '.join(found) or 'none'}")
        if not path.is_file():
            raise QuestionError(f"{path}: no such file")
        return str(path), path.read_bytes()
    try:
        return "the list", json.dumps(list(source), ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise QuestionError(f"expected a path or a list of rows, found {type(source).__name__}: {error}") from error


def read_rows(name: str, content: bytes, report: QuestionReport) -> list[QuestionRow]:
    """The rows that have a question; JSON (a list) or JSON lines.

    Raises:
        QuestionError: Invalid JSON, a field that is missing or of another type, or two different rows of one id.
    """
    rows, places = _values(name, content)
    found: list[QuestionRow] = []
    first: dict[str, tuple[int, Any]] = {}
    report.rows, report.unit = len(rows), places.unit
    for number, row in enumerate(rows):
        where = places.full(number)
        if not isinstance(row, dict):
            raise QuestionError(f"{where}: expected an object, found {type(row).__name__}")
        names = {key: _names(row, key, where) for key in FIELDS}
        question = row.get("question")
        if not isinstance(question, str):
            raise QuestionError(f"{where}, field 'question': expected text, found {type(question).__name__}")
        identity = str(number) if row.get("id") is None else str(row["id"])
        if identity in first:
            other, same = first[identity]
            if row != same:
                raise QuestionError(f"{name}: {places.both(other, number)} have the same id {identity!r}")
            report.skip(places.number(number), "repeats another row")
            continue
        first[identity] = number, row
        if question.strip():
            part = bool(row.get("sub_question"))
            found.append(QuestionRow(number, places.number(number), identity, question.strip(), names, part))
        else:
            report.skip(places.number(number), "no question")
    return found


def _values(name: str, content: bytes) -> tuple[list[Any], Places]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QuestionError(f"{name}: not UTF-8 text: {error}") from error
    if name.endswith(".jsonl"):
        return parse_json_lines(text, name, QuestionError)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise QuestionError(f"{name}: not valid JSON: {error}") from error
    if not isinstance(value, list):
        raise QuestionError(f"{name}: expected a JSON list of rows, found {type(value).__name__}")
    return value, Places(name)


def _names(row: dict[str, Any], key: str, where: str) -> list[str]:
    other = V2_NAMES.get(key, key)
    found = key if key in row else other
    if found not in row:
        hint = "; this is a raw file, stage 1 (entity linking) adds it" if key == "question_entities" else ""
        raise QuestionError(f"{where}: no field {key!r}; it has {', '.join(map(repr, row))}{hint}")
    values = row[found]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise QuestionError(f"{where}, field {found!r}: expected a list of names, found {str(values)[:60]}")
    return list(dict.fromkeys(values))


def flat_names(rows: Sequence[QuestionRow], key: str) -> list[str]:
    """All names of one field, row after row."""
    return [name for row in rows for name in row.names[key]]
