"""Numbers of things in words."""

from __future__ import annotations

from ragkit.units import counted


def test_one_and_many():
    assert [counted(n, "question") for n in (0, 1, 2000)] == ["0 questions", "1 question", "2,000 questions"]
    assert [counted(n, "entity", "entities") for n in (1, 2)] == ["1 entity", "2 entities"]
