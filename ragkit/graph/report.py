"""What a loader could not use, and the error it raises when nothing can be used."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ragkit.tables import html_table

SHOWN = 5  # examples of each kind that are kept
TEXT_WIDTH = 80


class GraphError(ValueError):
    """A graph that cannot be used; the message names the file, the line and what was expected."""


@dataclass(frozen=True)
class SkippedRow:
    """A row that was left out: its line (or row) number from 1, why, and how it begins."""

    number: int
    reason: str
    text: str
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.unit} {self.number}: {self.reason}: {self.text!r}"


@dataclass
class LoadReport:
    """How the reading of a graph went.

    Attributes:
        source: Where the graph came from.
        unit: What the numbers of skipped rows count: "line", or "row" (from 1; in a CSV file the head is row 1 and
            blank lines do not count).
        rows: Rows of triples (or edges) that were read, blank lines not counted.
        blank: Blank lines.
        reasons: Reason -> number of rows that were left out for it.
        skipped: The first few rows that were left out.
        quoted: Lines of a kg.txt without our mark that were read by their quotes (GFM-RAG v1 drops them).
        unknown_entities: Entries of documents that name no entity of the graph.
        unknown_examples: (document, name) of the first few of them.
        repeated_entities: Entries that repeat an entity of the same document; kept once.
        documents_without_entities: Documents that no entity leads to, so that no graph search can find them.
        documents_without_text: Documents with entities, but with no text in the corpus.
        notes: Anything else worth knowing.
        cached: Whether the graph came from ragkit's cache of these files.
    """

    source: str = "triples"
    unit: str = "line"
    rows: int = 0
    blank: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    skipped: list[SkippedRow] = field(default_factory=list)
    quoted: int = 0
    unknown_entities: int = 0
    unknown_examples: list[tuple[str, str]] = field(default_factory=list)
    repeated_entities: int = 0
    documents_without_entities: int = 0
    documents_without_text: int = 0
    notes: list[str] = field(default_factory=list)
    cached: bool = False

    @property
    def num_skipped(self) -> int:
        """Rows that were left out, for whatever reason."""
        return sum(self.reasons.values())

    @property
    def ok(self) -> bool:
        """Whether every row and every entry of a document could be used."""
        return not self.num_skipped and not self.unknown_entities

    def skip(self, number: int, reason: str, text: str) -> None:
        """Counts a row that is left out, and keeps it if it is one of the first."""
        self.count_only(reason, 1)
        self._keep(number, reason, text)

    def skip_many(
        self, numbers: np.ndarray, kinds: np.ndarray, reasons: Sequence[str], text: Callable[[int], str]
    ) -> None:
        """Counts many rows at once.

        Args:
            numbers: [M] rising numbers of the rows.
            kinds: [M] place in `reasons` of each row's reason.
            reasons: The reasons.
            text: Place in `numbers` -> how the row begins; asked for the first few only.
        """
        for kind, count in enumerate(np.bincount(kinds, minlength=len(reasons)).tolist()):
            self.count_only(reasons[kind], count)
        for place in range(min(SHOWN, len(numbers))):
            self._keep(int(numbers[place]), reasons[int(kinds[place])], text(place))

    def _keep(self, number: int, reason: str, text: str) -> None:
        shown = text if len(text) <= TEXT_WIDTH else f"{text[:TEXT_WIDTH]}..."
        self.skipped.append(SkippedRow(number, reason, shown, self.unit))
        if len(self.skipped) > SHOWN:  # readers find rows of different kinds at different times: keep the earliest
            self.skipped.sort(key=lambda row: row.number)
            self.skipped.pop()

    def count_only(self, reason: str, count: int) -> None:
        """Counts rows that are left out, without an example."""
        if count:
            self.reasons[reason] = self.reasons.get(reason, 0) + count

    def unknown(self, entries: Iterable[tuple[str, str]]) -> None:
        """Keeps the first few (document, name) whose name is no entity."""
        for entry in entries:
            if len(self.unknown_examples) >= SHOWN:
                break
            self.unknown_examples.append(entry)

    def problems(self) -> list[str]:
        """One phrase for each kind of thing that could not be used."""
        found = []
        if self.num_skipped:
            kinds = "; ".join(f"{reason}: {count:,}" for reason, count in self.reasons.items())
            if len(self.reasons) == 1:
                kinds = next(iter(self.reasons))
            first = f"; first: {self.skipped[0]}" if self.skipped else ""
            found.append(f"{self.num_skipped:,} of {self.rows:,} rows not used ({kinds}{first})")
        if self.unknown_entities:
            document, name = self.unknown_examples[0]
            found.append(
                f"{self.unknown_entities:,} entities of documents are not in the graph "
                f"(first: {name!r} of document {document!r})"
            )
        return found

    def summary(self) -> str:
        """One line: what could not be used, or that everything could."""
        return f"{self.source}: " + ("; ".join(self.problems()) or f"all {self.rows:,} rows used")

    def finish(self, strict: bool) -> None:
        """Prints the summary if something could not be used.

        Raises:
            GraphError: Something could not be used and `strict` is set.
        """
        if self.ok:
            return
        if strict:
            raise GraphError(self.summary())
        print(self.summary())

    def _lines(self) -> list[tuple[str, str]]:
        lines = [("rows", f"{self.rows:,}"), ("rows not used", f"{self.num_skipped:,}")]
        lines += [(f"  {reason}", f"{count:,}") for reason, count in self.reasons.items()]
        counts = {
            "blank lines": self.blank,
            "lines read by their quotes": self.quoted,
            "entities of documents not in the graph": self.unknown_entities,
            "entities given twice for a document": self.repeated_entities,
            "documents without an entity": self.documents_without_entities,
            "documents without a text": self.documents_without_text,
        }
        return lines + [(name, f"{count:,}") for name, count in counts.items() if count]

    def _examples(self) -> list[str]:
        found = [str(row) for row in self.skipped]
        found += [f"document {document!r}: no entity {name!r}" for document, name in self.unknown_examples]
        return found + self.notes

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self._lines())
        lines = [self.source + (" (from the cache)" if self.cached else "")]
        lines += [f"  {name.ljust(width)}  {count}" for name, count in self._lines()]
        return "\n".join(lines + [f"  {example}" for example in self._examples()])

    def _repr_html_(self) -> str:
        table = html_table([(self.source, ""), *self._lines()])
        examples = "".join(f"<li>{html.escape(example)}</li>" for example in self._examples())
        return table + (f"<ul>{examples}</ul>" if examples else "")
