"""Times, sizes and numbers of things in words."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """Seconds in words, to two digits."""
    for size, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * size:
            return f"{_two(seconds / size)} {name}"
    return f"{_two(seconds)} s"


def rough_duration(seconds: float) -> str:
    """Seconds as a person says them: "less than a minute", "about 3 minutes"."""
    if seconds < 45:
        return "less than a minute"
    larger = [(name, size) for name, size in (("day", 86400.0), ("hour", 3600.0)) if seconds >= 1.5 * size]
    name, size = larger[0] if larger else ("minute", 60.0)
    count = max(1, round(seconds / size))
    return f"about {counted(count, name)}"


def size(mib: float) -> str:
    """MiB in words, to two digits."""
    return f"{_two(mib / 1024)} GiB" if mib >= 995 else f"{_two(mib)} MiB"


def counted(number: int, one: str, many: str | None = None) -> str:
    """1 question, 2,000 questions.

    Args:
        number: How many.
        one: What one of them is called.
        many: What others are called; None: that with an s.
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _two(value: float) -> str:
    """Two significant digits, written out."""
    if value <= 0:
        return "0"
    places = 1 - math.floor(math.log10(value))
    rounded = round(value, places)
    return f"{rounded:,.{max(0, 1 - math.floor(math.log10(rounded)))}f}" if rounded < 10 else f"{rounded:,.0f}"
