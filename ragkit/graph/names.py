"""Millions of names without a Python object each."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ragkit.graph.report import GraphError

NEAR_CANDIDATES = 20_000  # difflib costs some 10 us a candidate
BATCH = 65_536


class Names(Sequence[str]):
    """A sequence of different, non-blank strings in one Arrow array; a name's place is its id.

    Args:
        values: Strings, or an Arrow array of them.
        what: What they name, for messages ("entity").

    Raises:
        GraphError: A name is missing, blank, not text, or stands there twice.
    """

    def __init__(self, values: Iterable[str] | pa.Array | pa.ChunkedArray = (), what: str = "name") -> None:
        self.what = what
        self._array = large_strings(values, what)
        if self._array.null_count:
            row = pc.is_null(self._array).index(True).as_py()
            raise GraphError(f"{what} {row} is missing (None)")
        blank = blank_names(self._array)
        if blank.any():
            row = int(blank.argmax())
            raise GraphError(f"{what} {row} is blank ({self[row]!r})")
        counts = pc.count_distinct(self._array).as_py()
        if counts < len(self._array):
            codes = self._array.dictionary_encode().indices.to_numpy()
            first = np.full(counts, len(codes))
            np.minimum.at(first, codes, np.arange(len(codes)))
            second = int(np.flatnonzero(first[codes] != np.arange(len(codes)))[0])
            raise GraphError(
                f"{what} {self[second]!r} stands there twice (places {first[codes[second]]} and {second})"
            )

    @classmethod
    def trusted(cls, array: pa.Array, what: str) -> Names:
        """Wraps a checked large_string array as it is (a dictionary, or our own cache)."""
        names = cls.__new__(cls)
        names.what = what
        names._array = array
        return names

    @property
    def array(self) -> pa.Array:
        """The Arrow array (large_string, no nulls)."""
        return self._array

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._array.slice(start, max(0, stop - start)).to_pylist()
            return self._array.take(pa.array(range(start, stop, step), pa.int64())).to_pylist()
        place = int(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"{self.what} {place} of {len(self)}")
        return self._array[place % len(self)].as_py()

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BATCH):
            yield from self._array.slice(start, BATCH).to_pylist()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.find(name) >= 0

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return self._array.equals(other._array)
        return isinstance(other, (list, tuple)) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(repr(name) for name in self[:3])
        return f"Names({len(self):,}: {shown}{', ...' if len(self) > 3 else ''})"

    def find(self, name: str) -> int:
        """The name's id, or -1; a scan, some 20 ms for 5 million names."""
        return self._array.index(pa.scalar(name, pa.large_string())).as_py()

    def index(self, name: str, start: int = 0, stop: int | None = None) -> int:  # type: ignore[override]
        """The name's id.

        Raises:
            GraphError: There is no such name; the message has the nearest one.
        """
        place = self.find(name)
        if not start <= place < (len(self) if stop is None else stop):
            raise GraphError(f"no {self.what} {name!r}{self.hint(name)}")
        return place

    def ids(self, names: Sequence[str] | pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Ids of many names at once.

        Args:
            names: M names.

        Returns:
            [M] int32, -1 for a name that is not there.
        """
        wanted = large_strings(names, self.what).dictionary_encode()
        unique, places = wanted.dictionary, wanted.indices.to_numpy(zero_copy_only=False)
        if len(unique) < len(self):  # hash the few and scan the many: no table of millions for one question
            hits = pc.index_in(self._array, value_set=unique)
            rows = np.flatnonzero(pc.is_valid(hits).to_numpy(zero_copy_only=False))
            of_unique = np.full(len(unique), -1, np.int32)
            of_unique[hits.take(pa.array(rows)).to_numpy(zero_copy_only=False)] = rows
        else:
            found = pc.fill_null(pc.index_in(unique, value_set=self._array), -1)
            of_unique = found.to_numpy(zero_copy_only=False)
        return of_unique[places].astype(np.int32) if len(places) else np.zeros(0, np.int32)

    def nearest(self, name: str) -> str | None:
        """The most similar name, or None where nothing is similar."""
        lower = pc.utf8_lower(self._array)
        place = lower.index(pa.scalar(name.lower(), pa.large_string())).as_py()
        if place >= 0:
            return self[place]
        candidates = self._array
        if len(candidates) > NEAR_CANDIDATES and name:
            lengths = pc.utf8_length(candidates)
            close = pc.and_(pc.greater_equal(lengths, len(name) - 2), pc.less_equal(lengths, len(name) + 2))
            ends = pc.or_(pc.starts_with(lower, name[:2].lower()), pc.ends_with(lower, name[-2:].lower()))
            candidates = candidates.filter(pc.and_(close, ends)).slice(0, NEAR_CANDIDATES)
        found = difflib.get_close_matches(name, candidates.to_pylist(), n=1)
        return found[0] if found else None

    def hint(self, name: str) -> str:
        """ " (did you mean 'x'?)", or nothing."""
        near = self.nearest(name)
        return f" (did you mean {near!r}?)" if near is not None else ""

    def update_hash(self, state: hashlib.blake2b) -> None:
        """Feeds count, lengths and bytes into a hash; the same for equal names on every machine."""
        array = contiguous(self._array)
        state.update(len(array).to_bytes(8, "little"))
        if len(array):
            _, offsets, data = array.buffers()
            ends = np.frombuffer(offsets, np.int64, len(array) + 1).astype("<i8", copy=False)
            state.update(ends.data)
            state.update(memoryview(data)[: int(ends[-1])] if data is not None else b"")


def large_strings(values: Any, what: str = "name") -> pa.Array:
    """Any sequence of strings (None stays null) as one contiguous large_string array.

    Raises:
        GraphError: A value is no text; the message has its place.
    """
    if isinstance(values, Names):
        return values.array
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            if not (pa.types.is_integer(values.type) or pa.types.is_null(values.type)):
                raise GraphError(f"{what}: expected text, found Arrow type {values.type}")
        values = values.cast(pa.large_string())
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks() if values.num_chunks != 1 else values.chunk(0)
        return contiguous(values)
    items = list(values)
    try:
        return pa.array(items, pa.large_string())
    except (pa.ArrowException, TypeError, UnicodeEncodeError):
        return pa.array([_text(item, row, what) for row, item in enumerate(items)], pa.large_string())


def _text(value: Any, row: int, what: str) -> str | None:
    if value is None or (isinstance(value, float) and value != value):  # NaN is how pandas says None
        return None
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise GraphError(f"{what} {row}: expected text, found {type(value).__name__} ({str(value)[:60]})")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GraphError(f"{what} {row}: {value!r} holds half a surrogate pair, which is not text") from error
    return value


def joined(*values: pa.Array | str, by: str = "") -> pa.Array:
    """Strings and constants joined row by row."""
    kind = pa.large_string()
    columns = [pa.scalar(value, kind) if isinstance(value, str) else value for value in values]
    return pc.binary_join_element_wise(*columns, pa.scalar(by, kind))


def contiguous(array: pa.Array) -> pa.Array:
    """The same large_string array, or a copy whose buffers hold nothing else."""
    if len(array) and (array.offset or int(np.frombuffer(array.buffers()[1], np.int64, 1)[0])):
        return array.take(pa.array(np.arange(len(array))))  # concat_arrays would give a single slice back as it is
    return array


def blank_names(array: pa.Array) -> np.ndarray:
    """[N] bool: names that are empty or nothing but white space."""
    blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(array)), 0)
    return pc.fill_null(blank, True).to_numpy(zero_copy_only=False)
