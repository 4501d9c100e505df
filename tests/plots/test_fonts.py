"""Letters that the pictures' font does not have are taken from another font where one is installed, without a word."""

from __future__ import annotations

import logging
import re
import warnings

import pytest
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font

from ragkit.gfm.neighbourhood import neighbourhood
from ragkit.graph import KnowledgeGraph
from ragkit.plots import fonts, loss_curves

OTHER = "STIXGeneral"  # comes with matplotlib, has letters that DejaVu Sans does not have
THIN = "cmsy10"  # comes with matplotlib, in one weight only


@pytest.fixture
def letter():
    missing = set(FT2Font(findfont(OTHER)).get_charmap()) - set(FT2Font(findfont(fonts.FONT)).get_charmap())
    return next(chr(code) for code in sorted(missing) if chr(code).isalpha())


@pytest.fixture
def helped(monkeypatch):
    """helped(NAMES): only these help out from now on."""

    def use(*names):
        monkeypatch.setattr(fonts, "OTHERS", names)
        fonts.families.cache_clear()

    yield use
    fonts.families.cache_clear()


def pictures(letter):
    """(PNG, SVG) of a plot and of a neighbourhood with a letter in their names."""
    plot = loss_curves({f"run {letter}": [{"step": i, "loss": 1 / i} for i in range(1, 9)]})
    near = neighbourhood(KnowledgeGraph.from_triples([(f"a {letter}", "of", "b")]), entities=["b"], hops=1)
    return (plot.png(), plot.svg("p")), (near.draw("png"), near.draw("svg"))


def test_another_font_helps_out_in_pixels_and_an_svg_is_the_same(helped, letter):
    helped()
    assert fonts.families() == [fonts.FONT]
    alone, plain = pictures(letter), pictures("x")
    helped("Not Installed", OTHER)
    assert fonts.families() == [fonts.FONT, OTHER]
    for (png, svg), (png_alone, svg_alone) in zip(pictures(letter), alone, strict=True):
        assert png != png_alone
        assert re.sub(r"[\d.]+", "", svg) == re.sub(r"[\d.]+", "", svg_alone)  # but for how wide the letter is
        assert letter in svg and fonts.FONTS in svg and OTHER not in svg
    assert pictures("x") == plain  # what the font has, it draws


def test_nothing_is_said_of_a_letter_that_is_nowhere_or_a_font_that_is_not_bold(helped, letter, caplog):
    helped(THIN)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "matplotlib"):
        warnings.simplefilter("error")
        pictures("\ue123")
        with fonts.no_word_of_fonts():
            with fonts.no_word_of_fonts():
                pass
            findfont(FontProperties(family=THIN, weight=841))
        assert not caplog.records
        findfont(FontProperties(family=THIN, weight=842))  # it says so once for each weight
    assert "Failed to find font weight" in caplog.text
