"""Passages, and the loaders that make them from whatever the user has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragkit import small_world
from ragkit.json_lines import Places, parse_json_lines

ID_FIELDS = ("id", "_id", "doc_id", "passage_id", "docid")
TEXT_FIELDS = ("text", "passage_text", "content", "contents", "passage")
TITLE_FIELDS = ("title",)


class CorpusError(ValueError):
    """A corpus that cannot be used; the message names the file, the row and the id."""


@dataclass(frozen=True)
class Passage:
    """A piece of text that can be retrieved.

    Args:
        id: Unique in its corpus. In a GFM-RAG corpus the key, for example `"Virginia [2]"`.
        text: The text, not empty.
        title: The title without the key's `" [2]"`; may be empty.
        metadata: Anything JSON can hold; kept, never read.
    """

    id: str
    text: str
    title: str = ""
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def full_text(self) -> str:
        """What the encoder reads: title, newline, text; or the text alone where there is no title."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True)
class RetrievedPassage(Passage):
    """A passage with the score it was retrieved with (higher is better; cosine for a dense retriever)."""

    score: float = 0.0

    @classmethod
    def of(cls, passage: Passage, score: float) -> RetrievedPassage:
        """`passage` with a score."""
        return cls(passage.id, passage.text, passage.title, passage.metadata, score)


def load_corpus(source: Any) -> list[Passage]:
    """Makes passages from any of the usual forms.

    Args:
        source: One of

            - `"small_world"`: the corpus that comes with ragkit;
            - a folder in the GFM-RAG layout (`raw/dataset_corpus.json`), or one that holds `dataset_corpus.json`;
            - a `.json` file (`{title: text}`, a list of texts or a list of rows) or a `.jsonl` file (one row a line);
            - a dict `{title: text}`, whose keys are the ids; a list of texts; a list of passages;
            - a list of dicts with `text` and, if there are any, `id` and `title`, or a `datasets.Dataset` or
              `pandas.DataFrame` with these columns. Without an id the title is the id, without a title the row number.
              Other columns become metadata.

    Returns:
        The passages in the order of the source.

    Raises:
        CorpusError: No passages, a passage without text, or two with one id; names the row and the id.
    """
    if isinstance(source, (str, Path)):
        return _load_path(source)
    return _build(source, Places("the corpus"))


def _load_path(source: str | Path) -> list[Passage]:
    path = small_world.path() if source == "small_world" else Path(source)
    if path.is_dir():
        candidates = [path / "raw" / "dataset_corpus.json", path / "dataset_corpus.json"]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise CorpusError(f"the folder {path} holds no corpus: expected raw/dataset_corpus.json in it")
        path = found[0]
    if not path.is_file():
        raise CorpusError(
            f"no corpus at {path}: expected a .json or .jsonl file, a folder with raw/dataset_corpus.json, "
            'or the name "small_world"'
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        rows, places = parse_json_lines(text, str(path), CorpusError)
        return _build(rows, places)
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _no_repeated_keys(pairs, path))
    except json.JSONDecodeError as error:
        raise CorpusError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    return _build(value, Places(str(path)))


def _no_repeated_keys(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    """JSON keeps the last of two equal keys and says nothing; a corpus would lose a passage that way."""
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise CorpusError(f"{path}: the key {repeated!r} stands there twice")
    return value


def _build(source: Any, places: Places) -> list[Passage]:
    if isinstance(source, Mapping):
        rows: Iterable[Any] = [_from_key(key, value, places.name) for key, value in source.items()]
    elif hasattr(source, "iterrows"):  # a pandas.DataFrame
        rows = source.to_dict("records")
    elif isinstance(source, Iterable):
        rows = source
    else:
        raise CorpusError(f"a corpus cannot be made from {type(source).__name__}: see ragkit.rag.load_corpus")
    passages: list[Passage] = []
    first_row: dict[str, int] = {}
    for number, row in enumerate(rows):
        passage = _passage(row, number, places.full(number))
        if not passage.text.strip():
            raise CorpusError(f"{places.full(number)} (id {passage.id!r}): the passage has no text")
        if passage.id in first_row:
            raise CorpusError(
                f"{places.full(number)}: the id {passage.id!r} is that of {places.short(first_row[passage.id])} too; "
                "ids must be unique (give each row an id)"
            )
        first_row[passage.id] = number
        passages.append(passage)
    if not passages:
        raise CorpusError(f"{places.name} is empty: a RAG system needs at least one passage")
    return passages


def _from_key(key: Any, value: Any, name: str) -> Passage:
    """One entry of a GFM-RAG corpus: the key is the id, and the title once its " [n]" is off."""
    if not isinstance(value, str):
        raise CorpusError(
            f"{name}, key {key!r}: expected the passage's text, found {type(value).__name__}"
            + (" (for a DatasetDict choose a split)" if hasattr(value, "column_names") else "")
        )
    return Passage(str(key), value, re.sub(r" \[\d+\]$", "", str(key)))


def _passage(row: Any, number: int, where: str) -> Passage:
    if isinstance(row, Passage):
        return row
    if isinstance(row, str):
        return Passage(str(number), row)
    if not isinstance(row, Mapping):
        raise CorpusError(f"{where}: expected a text or a dict with text, found {type(row).__name__}")
    text, text_field = _first(row, TEXT_FIELDS)
    title, title_field = _first(row, TITLE_FIELDS)
    identifier, id_field = _first(row, ID_FIELDS)
    if text_field is None:
        columns = ", ".join(map(str, row)) or "no fields"
        raise CorpusError(f"{where}: no field text (found: {columns})")
    title = title if isinstance(title, str) else ""  # None, or the NaN with which pandas marks an empty cell
    if identifier is None:
        identifier = title or number
    if not isinstance(text, str):
        raise CorpusError(f"{where} (id {identifier!r}): the text is {text!r}, expected a string")
    rest = {str(key): value for key, value in row.items() if key not in (text_field, title_field, id_field)}
    if set(rest) == {"metadata"} and isinstance(rest["metadata"], Mapping):
        rest = dict(rest["metadata"])
    return Passage(str(identifier), text, title, rest)


def _first(row: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, str | None]:
    for name in names:
        if name in row:
            return row[name], name
    return None, None
