"""The font of all pictures, and those that help out with letters that it does not have."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from ragkit.optional import require

FONT = "DejaVu Sans"  # comes with matplotlib: the same picture on every machine
FONTS = f"'{FONT}', Verdana, sans-serif"  # what a browser may take; for other letters it finds fonts of its own
# Chinese, Japanese, Korean, Hindi, Bengali, Tamil, Thai and emoji, on Linux, macOS and Windows.
OTHERS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR", "Source Han Sans SC",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "IPAexGothic", "Hiragino Sans GB", "Hiragino Sans", "PingFang SC",
    "Arial Unicode MS", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "NanumGothic",
    "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Thai", "Lohit Devanagari", "Nirmala UI",
    "Leelawadee UI", "Noto Emoji", "Symbola", "Segoe UI Emoji",
)  # fmt: skip


@lru_cache(maxsize=1)
def families() -> list[str]:
    """`FONT`, and of `OTHERS` those that are installed: a picture of pixels takes its letters from this machine."""
    installed = set(require("matplotlib.font_manager", extra="notebooks").get_font_names())
    return [FONT, *(name for name in OTHERS if name in installed)]


@contextmanager
def no_word_of_fonts() -> Iterator[None]:
    """matplotlib does not say that a letter is nowhere (an SVG's reader may have it), or a font not as bold."""

    def other(record: logging.LogRecord) -> bool:
        return "Failed to find font weight" not in record.getMessage()

    log = logging.getLogger("matplotlib.font_manager")
    log.addFilter(other)  # a function of this call: another thread's, or an outer one's, stays
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")
            yield
    finally:
        log.removeFilter(other)


def page_fonts(style: str) -> str:
    """A style of matplotlib's SVG with `FONTS`, whatever is installed where it was made."""
    return re.sub(rf"'{FONT}'(, '[^']*')*", FONTS, style)
