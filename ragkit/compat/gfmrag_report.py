"""The report of what became of the settings of a GFM-RAG file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SECRET = ("api_key", "token", "password", "secret")
LONGEST = 60  # characters of a value in a report


@dataclass
class ConversionReport:
    """What became of the settings of a GFM-RAG file.

    Attributes:
        source: The file.
        kind: "finetune" or "pretrain".
        used: (their key, our key, value) of what was taken over.
        unused: (their key, value, reason) of what has no counterpart.
        unknown: (their key, value, nearest key that is known or None).
        notes: Sentences on what is kept as in v1, and on what is different all the same.
    """

    source: str
    kind: str
    used: list[tuple[str, str, Any]] = field(default_factory=list)
    unused: list[tuple[str, Any, str]] = field(default_factory=list)
    unknown: list[tuple[str, Any, str | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        left = len(self.unused) + len(self.unknown)
        lines = [f"{self.source}: GFM-RAG's settings for {self.kind}; {len(self.used)} taken over, {left} not"]
        lines += [f"  {note}" for note in self.notes]
        by_reason: dict[str, list[str]] = {}
        for key, value, reason in self.unused:
            by_reason.setdefault(reason, []).append(_shown(key, value))
        lines += ["not used:"] if by_reason else []
        for reason, keys in by_reason.items():
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            lines.append(f"  {', '.join(keys[:4])}{more}: {reason}")
        lines += ["unknown, not used:"] if self.unknown else []
        for key, value, near in self.unknown:
            lines.append(f"  {_shown(key, value)}" + (f"; did you mean {near}?" if near else ""))
        return "\n".join(lines)


def _shown(key: str, value: Any) -> str:
    text = "..." if key.endswith(SECRET) else str(value)
    return f"{key}={text if len(text) <= LONGEST else text[: LONGEST - 3] + '...'}"
