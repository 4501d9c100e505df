"""Files of JSON lines, and where each row of a source stands, as messages say it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Places:
    """Where rows stand: by their number from 0, in a file of JSON lines by the line, which editors count from 1.

    Attributes:
        name: The source, for messages.
        lines: Line of each row; None where rows are no lines.
    """

    name: str
    lines: tuple[int, ...] | None = None

    @property
    def unit(self) -> str:
        """What `number` counts: "row" or "line"."""
        return "row" if self.lines is None else "line"

    def number(self, row: int) -> int:
        """The line of a row, or the row itself."""
        return row if self.lines is None else self.lines[row]

    def short(self, row: int) -> str:
        """Such as "row 3"."""
        return f"{self.unit} {self.number(row)}"

    def full(self, row: int) -> str:
        """Such as "data.jsonl, line 4"."""
        return f"{self.name}, {self.short(row)}"

    def both(self, first: int, second: int) -> str:
        """Such as "rows 3 and 5"."""
        return f"{self.unit}s {self.number(first)} and {self.number(second)}"


def parse_json_lines(text: str, name: str, error: type[ValueError]) -> tuple[list[Any], Places]:
    """The values of JSON lines and their places; empty lines do not count as rows.

    Args:
        text: The file's text.
        name: The file, for messages.
        error: What a line that is not JSON raises.
    """
    values, lines = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except json.JSONDecodeError as problem:
                raise error(f"{name}, line {number}: not valid JSON: {problem.msg}") from problem
            lines.append(number)
    return values, Places(name, tuple(lines))
