from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.graph import normalise
from ragkit.graph.normalise import v1_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Austin E. Knowlton", "austin e knowlton"),
        ("São Paulo", "são paulo"),
        ("Sa\u0303o  Paulo", "são paulo"),
        ("北京", "北京"),
        ("「東京」、日本", "東京 日本"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("ﬁnal ②", "final 2"),
        ("snake_case-name", "snake case name"),
        ("C++", "c++"),
        ("co\u00adoperate", "cooperate"),
        ("हिन्दी", "हिन्दी"),
        ("a\tb\nc\u3000d", "a b c d"),
        ("...!?", ""),
        ("", ""),
    ],
)
def test_normalise(name, expected):
    assert normalise(name) == expected


@given(st.text())
def test_normalise_is_stable_and_clean(name):
    once = normalise(name)
    assert normalise(once) == once
    assert once == once.strip() and "  " not in once
    assert not any(unicodedata.category(letter)[0] in "PC" for letter in once)


@given(st.text(st.characters(categories=["Ll", "Lu", "Nd"], max_codepoint=0x17F), min_size=1))
def test_spelling_in_upper_and_lower_case_is_one_name(name):
    assert normalise(name.lower()) == normalise(name) and normalise(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Austin E. Knowlton", "austin e  knowlton"),
        ("São Paulo", "s o paulo"),
        ("北京", ""),
        (" a,b ", "a b"),
        ("tab\there", "tab here"),
        ("İ", "i"),
    ],
)
def test_v1_name(name, expected):
    assert v1_name(name) == expected


@given(st.text())
def test_v1_name_is_processing_phrases(name):
    assert v1_name(name) == re.sub("[^A-Za-z0-9 ]", " ", name.lower()).strip()
