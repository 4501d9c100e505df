"""Questions with answers, from whatever people keep them in, as one list of `QAExample`."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from ragkit import small_world
from ragkit.json_lines import Places, parse_json_lines
from ragkit.notes import note
from ragkit.sampling import draw

# Our field names, with the names other kits and data sets give the same column; the first one present is taken.
ALIASES: dict[str, tuple[str, ...]] = {
    "question": ("question", "query"),
    "answer": ("answer", "response", "answers"),
    "supporting": ("supporting_facts", "supporting", "contexts_ids"),
    "answer_aliases": ("answer_aliases",),
    "id": ("id",),
}
REQUIRED = ("question", "answer")


class DataError(ValueError):
    """Training or test rows that cannot be read; names the file, the row and the field."""


@dataclass(frozen=True)
class QAExample:
    """One question.

    Attributes:
        id: Unique within its data; the row's number where the data has no ids.
        question: The question's text.
        answers: Accepted answers; the first is the one that is trained on. May be empty.
        supporting: Ids of the passages that support the answer. May be empty.
        metadata: The row's other columns.
    """

    id: str
    question: str
    answers: tuple[str, ...] = ()
    supporting: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def answer(self) -> str:
        """The main answer, or "" if the row has none."""
        return self.answers[0] if self.answers else ""


class QAData(Sequence[QAExample]):
    """The examples of one source, and what was left out of them.

    Attributes:
        source: Where the rows came from, for messages.
        skipped: (row number from 0, reason) of each row that was left out.
    """

    def __init__(
        self, examples: Sequence[QAExample], source: str = "rows", skipped: Sequence[tuple[int, str]] = ()
    ) -> None:
        self._examples = list(examples)
        self.source = source
        self.skipped = list(skipped)

    @overload
    def __getitem__(self, index: int) -> QAExample: ...
    @overload
    def __getitem__(self, index: slice) -> QAData: ...
    def __getitem__(self, index: int | slice) -> QAExample | QAData:
        if isinstance(index, slice):
            return QAData(self._examples[index], self.source, self.skipped)
        return self._examples[index]

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[QAExample]:
        return iter(self._examples)

    def sample(self, size: int | None, seed: int = 0) -> QAData:
        """Examples drawn at random, in their order; a smaller sample of the same seed is part of a larger one.

        Args:
            size: How many; None, or more than there are: all.
            seed: Seed of the draw.

        Raises:
            ValueError: `size` is below 0.
        """
        chosen = [self._examples[place] for place in draw(len(self), size, seed)]
        return QAData(chosen, self.source, self.skipped)

    def __repr__(self) -> str:
        counts = [f"{len(self)} questions from {self.source}"]
        without_answer = sum(not example.answers for example in self)
        without_support = sum(not example.supporting for example in self)
        if without_answer:
            counts.append(f"{without_answer} without an answer")
        if without_support:
            counts.append(f"{without_support} without a supporting passage")
        if self.skipped:
            counts.append(f"{len(self.skipped)} rows skipped")
        return f"QAData({', '.join(counts)})"


def load_qa(source: Any, columns: Mapping[str, str] | None = None, split: str | None = None) -> QAData:
    """Reads questions and answers.

    Args:
        source: One of
            - `[{"query": [...], "response": [...]}]`: one dict of columns in a list, as in FedRAG's quick start;
            - a dict of columns, or a list of dicts (one per row);
            - a `.jsonl` file (one object a line) or a `.json` file (any of the layouts above);
            - a folder in the GFM-RAG layout (`raw/train.json`, `raw/test.json`), or "small_world";
            - a `datasets.Dataset` (or a `DatasetDict`, with `split`), or a `pandas.DataFrame`;
            - a `QAData` or a list of `QAExample`, which are kept as they are.
        columns: Our field name -> the source's column name, for columns called something else. Fields: question,
            answer, supporting, answer_aliases, id. Without it the usual names are recognised (`ALIASES`).
        split: Which file of a folder, or entry of a `DatasetDict`; default "train".

    Returns:
        The examples. A row with no question (or with nothing at all) is left out, listed in `.skipped`, and a line is
        printed that says how many and why. A row with a question and an empty answer stays, with `answers == ()`.

    Raises:
        DataError: A file that is not there or not JSON, a missing column, columns of different length, a field of the
            wrong type, an id used twice, or no usable row at all.
    """
    if isinstance(source, QAData):
        return source
    places, rows = _read(source, split)
    name = places.name
    if rows and all(isinstance(row, QAExample) for row in rows):
        return QAData(_unique(list(enumerate(rows)), places), name)
    rows, places = _expand_columns(rows, places, columns)
    if not rows:
        raise DataError(f"{name}: no rows")
    fields = _match_columns(rows, name, columns)
    examples: list[tuple[int, QAExample]] = []
    skipped: list[tuple[int, str]] = []
    for number, row in enumerate(rows):
        example = _example(row, number, fields, places.full(number))
        if isinstance(example, str):
            skipped.append((number, example))
        else:
            examples.append((number, example))
    if skipped:
        shown = "; ".join(f"{places.short(number)}: {reason}" for number, reason in skipped[:3])
        note(f"{name}: skipped {len(skipped)} of {len(rows)} rows ({shown}{'; ...' if len(skipped) > 3 else ''})")
    if not examples:
        raise DataError(f"{name}: all {len(rows)} rows are empty ({places.short(0)}: {skipped[0][1]})")
    return QAData(_unique(examples, places), name, skipped)


def _read(source: Any, split: str | None) -> tuple[Places, list[Any]]:
    """(places for messages, list of rows or of dicts of columns)."""
    if isinstance(source, (str, Path)):
        return _read_path(source, split)
    if isinstance(source, Mapping):
        if source and all(hasattr(value, "column_names") for value in source.values()):  # datasets.DatasetDict
            wanted = split or "train"
            if wanted not in source:
                raise DataError(f"the data set has no split {wanted!r}; it has {_names(source)}")
            return Places(f"split {wanted!r}"), list(source[wanted])
        return Places("the dict"), [source]
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas.DataFrame
        return Places("the DataFrame"), source.to_dict("records")
    if hasattr(source, "column_names"):  # datasets.Dataset
        return Places("the Dataset"), list(source)
    if isinstance(source, Sequence):
        return Places("the list"), list(source)
    raise DataError(
        f"cannot read questions from a {type(source).__name__}; give a list of dicts, a dict of columns, a .jsonl or "
        ".json path, a GFM-RAG folder, a datasets.Dataset or a pandas.DataFrame"
    )


def _read_path(source: str | Path, split: str | None) -> tuple[Places, list[Any]]:
    if str(source) == "small_world" and not Path(source).exists():
        path = small_world.path()
    else:
        path = Path(source).expanduser()
    if path.is_dir():
        folder = path / "raw" if (path / "raw").is_dir() else path
        path = folder / f"{split or 'train'}.json"
        if not path.exists():
            found = sorted(file.stem for file in folder.glob("*.json") if file.stem != "dataset_corpus")
            raise DataError(f"{path}: no such file; the splits there are: {', '.join(found) or 'none'}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    name = str(path) if str(source) != "small_world" else f"small_world ({path.stem})"
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":
        rows, places = parse_json_lines(text, name, DataError)
        return places, rows
    value = _json(text, str(path))
    if isinstance(value, dict):
        return Places(name), [value]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a JSON list of rows or an object of columns, found {type(value).__name__}")
    return Places(name), value


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error


def _expand_columns(
    rows: list[Any], places: Places, columns: Mapping[str, str] | None
) -> tuple[list[dict[str, Any]], Places]:
    """Turns each dict of columns among the rows into its rows; a dict of columns has a list as its question.

    Where there was one, the rows are no lines of their file any more.
    """
    name = places.name
    question_names = (columns or {}).get("question"), *ALIASES["question"]
    expanded: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{places.full(number)}: expected a dict, found {type(row).__name__} ({str(row)[:60]!r})")
        key = next((key for key in question_names if key in row), None)
        column = row[key] if key is not None else next(iter(row.values()), None)
        if isinstance(column, (str, Mapping)) or not isinstance(column, Sequence):
            expanded.append(dict(row))
            continue
        wrong = [k for k, value in row.items() if isinstance(value, str) or not isinstance(value, Sequence)]
        if wrong:
            raise DataError(f"{name}: column {wrong[0]!r} is not a list, but column {key!r} is")
        lengths = {str(k): len(value) for k, value in row.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{k}: {length}" for k, length in lengths.items())
            raise DataError(f"{name}: the columns have different lengths ({listed})")
        places = Places(name)
        expanded += [dict(zip(row, values, strict=True)) for values in zip(*row.values(), strict=True)]
    return expanded, places


def _match_columns(rows: list[dict[str, Any]], name: str, columns: Mapping[str, str] | None) -> dict[str, str]:
    """Our field -> the column that holds it, for the fields that are there."""
    present = dict.fromkeys(str(key) for row in rows for key in row)
    for ours in columns or {}:
        if ours not in ALIASES:
            raise DataError(
                f"columns: unknown field {ours!r}{_nearest(ours, ALIASES)}; the fields are {_names(ALIASES)}"
            )
    fields: dict[str, str] = {}
    for ours, names in ALIASES.items():
        if columns and ours in columns:
            if columns[ours] not in present:
                raise DataError(
                    f"{name}: no column {columns[ours]!r} (asked for as {ours})"
                    f"{_nearest(columns[ours], present)}; the columns are {_names(present)}"
                )
            fields[ours] = columns[ours]
            continue
        found = next((candidate for candidate in names if candidate in present), None)
        if found is not None:
            fields[ours] = found
        elif ours in REQUIRED:
            near = next((hint for candidate in names if (hint := _nearest(candidate, present))), "")
            raise DataError(
                f"{name}: no column for the {ours} (looked for {' or '.join(map(repr, names))}); the columns are "
                f"{_names(present)}{near}. Say which one it is with columns={{{ours!r}: ...}}"
            )
    return fields


def _example(row: dict[str, Any], number: int, fields: dict[str, str], where: str) -> QAExample | str:
    """The row's example, or the reason to leave it out."""
    question = _text(row.get(fields["question"]), f"{where}, field {fields['question']!r}")
    answers = _texts(row.get(fields["answer"]), f"{where}, field {fields['answer']!r}")
    if not question:
        return "empty row" if not answers else f"no {fields['question']}"
    more: dict[str, tuple[str, ...]] = {}
    for ours in ("answer_aliases", "supporting"):
        column = fields.get(ours)
        more[ours] = _texts(row.get(column), f"{where}, field {column!r}") if column else ()
    identity = row.get(fields["id"]) if "id" in fields else None
    used = set(fields.values())
    return QAExample(
        id=str(number) if _missing(identity) else str(identity),
        question=question,
        answers=tuple(dict.fromkeys(answers + more["answer_aliases"])) if answers else (),
        supporting=tuple(dict.fromkeys(more["supporting"])),
        metadata={str(key): value for key, value in row.items() if key not in used},
    )


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # NaN is how pandas says None


def _text(value: Any, where: str) -> str:
    if _missing(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{where}: expected text, found {type(value).__name__} ({str(value)[:60]})")
    return str(value).strip()


def _texts(value: Any, where: str) -> tuple[str, ...]:
    """One text or a list of them (numpy arrays, as parquet readers give them, count as lists)."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(text for item in values if (text := _text(item, where)))


def _unique(examples: list[tuple[int, QAExample]], places: Places) -> list[QAExample]:
    seen: dict[str, int] = {}
    for number, example in examples:
        if example.id in seen:
            raise DataError(f"{places.name}: {places.both(seen[example.id], number)} have the same id {example.id!r}")
        seen[example.id] = number
    return [example for _, example in examples]


def _nearest(wanted: str, names: Any) -> str:
    close = difflib.get_close_matches(wanted, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _names(names: Any) -> str:
    return ", ".join(repr(name) for name in names) or "none"
