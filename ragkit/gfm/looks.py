"""How pictures of graphs look: fonts, colours, and the width of a text."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from ragkit.optional import require
from ragkit.plots.fonts import FONT, no_word_of_fonts

SVG = "http://www.w3.org/2000/svg"


@dataclass(frozen=True)
class Look:
    """Colours; those of the boxes and edges stay apart for colour-blind eyes (Okabe and Ito), on either ground."""

    ground: str
    text: str
    faint: str
    question: tuple[str, str]  # (face, edge)
    between: tuple[str, str]
    target: tuple[str, str]
    raises: tuple[str, str]  # (least, most)
    lowers: tuple[str, str]


LIGHT = Look(
    "#ffffff", "#1a1a1a", "#5c6670", ("#dceefb", "#0072b2"), ("#f5f6f7", "#7b8794"), ("#fdebc8", "#b36b00"),
    ("#b4c7d6", "#005a8f"), ("#e3bda6", "#c04a00"),
)  # fmt: skip
DARK = Look(
    "#16191d", "#f0f2f4", "#a9b4bf", ("#10374f", "#56b4e9"), ("#252a30", "#8b98a5"), ("#4a3408", "#f0b429"),
    ("#3f5666", "#6cc3f5"), ("#6b4a38", "#ff8f4d"),
)  # fmt: skip


@lru_cache(maxsize=8192)
def text_width(text: str, size: float, bold: bool = False) -> float:
    """Inches, for a size in points; a character as wide as it is high (Chinese, emoji) counts as a square."""
    squares = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    text = "".join(c for c in text if unicodedata.east_asian_width(c) not in "WF") if squares else text
    properties = require("matplotlib.font_manager").FontProperties(
        family=FONT, size=size, weight="bold" if bold else "normal"
    )
    measure = require("matplotlib.textpath").text_to_path.get_text_width_height_descent
    with no_word_of_fonts():
        return (measure(text, properties, False)[0] + squares * size) / 72
