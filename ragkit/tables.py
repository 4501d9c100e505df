"""Small tables as text and as HTML, escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence


def number(value: float) -> str:
    """Three decimals; a hyphen for nan."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length, the head first; the first column to the left, the rest to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def html_table(rows: Sequence[Sequence[str]], note: str = "") -> str:
    """The same rows as an HTML table, with a note under it."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    end = f"<p>{html.escape(note)}</p>" if note else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{end}"
