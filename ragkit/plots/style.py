"""How all pictures look: colours, hatches, dashes and markers, axes, and numbers in words."""

from __future__ import annotations

import math
import threading
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ragkit.optional import require
from ragkit.plots.fonts import families, no_word_of_fonts

# What is drawn in these three is given the colours of the page where a picture stands in one (ragkit.plots.svg); they
# are odd numbers so that nothing else has them by chance.
INK, FAINT, GROUND = "#1a1b1c", "#8a8b8c", "#fffffe"
# Okabe and Ito's colours, which stay apart for colour-blind eyes. These four are readable on white and on black; the
# dashes and the markers say the same without colour.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.3, 1.3)), (0, (6, 1.5, 1.3, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P")
# Faces and hatches of bars.
BARS = (("#bbbbbb", ""), ("#56b4e9", "//"), ("#0072b2", ""), (GROUND, ".."), (GROUND, "xx"), ("#e69f00", "\\\\"))
RAW = "#9aa0a6"  # what was measured, behind what is made of it
SIZE = 9.0  # points
WIDTH, HEIGHT = 8.0, 3.5  # inches

# matplotlib's settings belong to the whole process, and a panel draws in a thread of its own.
_lock = threading.RLock()


@contextmanager
def drawing() -> Iterator[None]:
    """matplotlib's own defaults with ours, whatever the session has set, for one thread at a time."""
    matplotlib = require("matplotlib", extra="notebooks")
    ours = {
        "font.family": families(),
        "font.size": SIZE,
        "text.color": INK,
        "text.parse_math": False,  # a name may hold dollar signs
        "axes.titlesize": SIZE + 0.5,
        "axes.titlelocation": "left",
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": False,
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.alpha": 0.35,
        "grid.linewidth": 0.6,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": SIZE - 1,
        "ytick.labelsize": SIZE - 1,
        "hatch.color": INK,
        "hatch.linewidth": 0.6,
        "figure.facecolor": GROUND,
        "figure.constrained_layout.w_pad": 0.08,
        "legend.frameon": False,
        "legend.fontsize": SIZE - 1,
        "legend.handlelength": 2.6,
        "svg.fonttype": "none",
        "svg.hashsalt": "ragkit",
    }
    with _lock, no_word_of_fonts(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "constrained_layout not applied")
        # The backend is left alone: to set it would end the session's pyplot figures.
        defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name not in _KEPT}
        with matplotlib.rc_context({**defaults, **ours}):
            yield


_KEPT = ("backend", "backend_fallback", "interactive", "toolbar", "timezone", "webagg.port", "webagg.address")


def new_figure(height: float = HEIGHT, width: float = WIDTH) -> Any:
    """An empty `Figure` without pyplot state; sizes in inches."""
    return require("matplotlib.figure", extra="notebooks").Figure(figsize=(width, height), layout="constrained")


def line_look(number: int) -> dict[str, Any]:
    """Colour and dash of line `number`; the pair repeats after 16 lines only."""
    return {"color": LINES[number % len(LINES)], "linestyle": DASHES[(number + number // len(LINES)) % len(DASHES)]}


def bar_look(number: int) -> dict[str, Any]:
    """Face, hatch and edge of bars."""
    face, hatch = BARS[number % len(BARS)]
    return {"facecolor": face, "hatch": hatch, "edgecolor": INK, "linewidth": 0.8}


def empty(axes: Any, words: str) -> None:
    """Says in the middle of axes that there is nothing to draw."""
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])


def plain_ticks(axis: Any) -> None:
    """Ticks as plain numbers (1,000 in place of 10 to the power of 3), on log scales too."""
    ticker = require("matplotlib.ticker")
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: figures(value, 6)))
    axis.set_minor_formatter(ticker.NullFormatter())


# ---- words ----


def figures(value: float, digits: int = 2) -> str:
    """A number to so many significant digits: 0.046, 0.5, 12, 1,200; 2.1e-05 where it is very small."""
    value = float(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    size = math.floor(math.log10(abs(rounded)))
    if size < -4:
        number, exponent = f"{value:.{digits}g}".split("e")
        return f"{number}e{exponent}"
    if size >= 9:
        return f"{value:.{digits}g}"
    return f"{rounded:,.{max(0, digits - 1 - size)}f}" if size < digits - 1 and digits < 6 else _short(rounded, size)


def _short(value: float, size: int) -> str:
    """Without zeros at the end."""
    text = f"{value:,.{max(0, 5 - size)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def listing(parts: Sequence[str]) -> str:
    """a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else "none"


def one_line(text: str) -> str:
    """Without line breaks, control characters and halves of characters (an SVG may not hold them)."""
    return " ".join("".join(" " if unicodedata.category(c) in _NO_TEXT else c for c in str(text)).split())


_NO_TEXT = ("Cc", "Cs", "Zl", "Zp")


def legend_name(name: str, width: int) -> str:
    """A name for a legend; matplotlib leaves out empty ones and those that begin with "_"."""
    name = shorten(name, width) or "(no name)"
    return f"\u200b{name}" if name.startswith("_") else name  # a space without width


def legend_columns(names: Sequence[str], most: int) -> int:
    """How many names fit beside each other above or below a picture of the usual width."""
    return max(1, min(most, len(names), 110 // (max(map(len, names)) + 8)))


def cut(text: str, width: int) -> str:
    """One line of at most `width` characters; the end goes."""
    text = one_line(text)
    return text if len(text) <= width else f"{text[: width - 1].rstrip()}…"


def shorten(name: str, width: int) -> str:
    """One line of at most `width` characters; the middle goes, because ends tell names apart."""
    name = one_line(name)
    if len(name) <= width:
        return name
    left = (width - 1) // 3
    return f"{name[:left]}…{name[len(name) - (width - 1 - left) :]}"
