"""Prompt templates: exact texts, no second substitution, and fitting a budget by cutting passages only."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ragkit.prompts import TEMPLATES, PromptError, PromptTemplate, fit, get_template
from ragkit.rag.corpus import Passage


class Words:
    """A tokenizer with one token for each word and each line break, as far as `fit` uses one."""

    def __call__(self, text):
        return {"input_ids": re.findall(r"\n|\S+", text)}


def test_plain_is_the_format_of_the_tiny_lm():
    prompt = TEMPLATES["plain"].render("Where is Lima?", [Passage("a", "Lima is in Peru.", "Lima"), "Peru is big."])
    assert prompt == "Passage: Lima is in Peru.\nPassage: Peru is big.\nQuestion: Where is Lima?\nAnswer:"
    assert TEMPLATES["plain"].response_prefix == " "


def test_sources_numbers_the_passages():
    prompt = TEMPLATES["sources"].render("Where?", ["One.", "Two."])
    assert prompt == "Answer the question from the sources.\n[1] One.\n[2] Two.\nQuestion: Where?\nAnswer:"


def test_without_passages_no_empty_line_is_left():
    assert TEMPLATES["plain"].render("Where?", []) == "Question: Where?\nAnswer:"


def test_braces_in_passages_and_questions_are_text():
    prompt = TEMPLATES["plain"].render("What is {passages}?", ["{question} {n} {text}", r"\1 \g<0>"])
    assert prompt == "Passage: {question} {n} {text}\nPassage: \\1 \\g<0>\nQuestion: What is {passages}?\nAnswer:"


def test_titles_where_the_passage_format_asks_for_them():
    template = PromptTemplate("mine", "{passages}\n{question}", passage="{n}. {title}: {text}", separator="\n\n")
    assert template.render("Q", [Passage("a", "x", "A"), "y"]) == "1. A: x\n\n2. : y\nQ"


def test_get_template_by_name_text_or_as_it_is():
    assert get_template("plain") is TEMPLATES["plain"]
    assert get_template("Use {passages} for {question}").render("Q", ["P"]) == "Use [1] P for Q"
    assert get_template(TEMPLATES["plain"]) is TEMPLATES["plain"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("sourcs", "did you mean 'sources'"),
        ("{passages} only", r"must hold \{question\} exactly once, found 0"),
        ("{passages}{question}{question}", r"must hold \{question\} exactly once, found 2"),
    ],
)
def test_a_wrong_template_is_named(template, message):
    with pytest.raises(PromptError, match=message):
        get_template(template)


def test_a_passage_format_without_text_is_refused():
    with pytest.raises(PromptError, match="passage format"):
        PromptTemplate("mine", "{passages}{question}", passage="{title}")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    passages=st.lists(st.lists(st.sampled_from(["a", "bb", "ccc", "Lima,"]), max_size=30).map(" ".join), max_size=4),
    budget=st.integers(8, 60),
)
def test_fit_keeps_the_question_and_cuts_passages_at_words(passages, budget):
    try:
        prompt = fit("plain", Words(), "Where is it?", passages, budget)
    except PromptError:
        assert len(Words()(TEMPLATES["plain"].render("Where is it?", ["" for _ in passages]))["input_ids"]) > budget
        return
    assert len(Words()(prompt)["input_ids"]) <= budget
    lines = prompt.split("\n")
    assert lines[-2:] == ["Question: Where is it?", "Answer:"]
    kept = [line.removeprefix("Passage: ") for line in lines[:-2]]
    assert len(kept) == len(passages)
    for short, full in zip(kept, passages, strict=True):
        assert full.split()[: len(short.split())] == short.split()
    # as much is kept as fits: either nothing was cut, or one more word of the longest would not fit with the rest
    if kept != [p.rstrip() for p in passages]:
        longest = max(len(p) for p in kept)
        one_more = [p if len(p) <= longest else _next_word(p, k) for p, k in zip(passages, kept, strict=True)]
        assert len(Words()(TEMPLATES["plain"].render("Where is it?", one_more))["input_ids"]) > budget


def _next_word(full: str, kept: str) -> str:
    return " ".join(full.split()[: len(kept.split()) + 1])


def test_fit_cuts_the_longest_first():
    prompt = fit("plain", Words(), "Q", ["a b", "c d e f g h i j k l m n"], 14)
    assert prompt.startswith("Passage: a b\nPassage: c d")
    assert len(Words()(prompt)["input_ids"]) <= 14


def test_fit_cuts_texts_without_spaces_too(tokenizer):
    prompt = fit("plain", tokenizer, "哪里?", ["北京是中国的首都。" * 20], 120)
    assert "北京是中国" in prompt and prompt.endswith("Question: 哪里?\nAnswer:")
    assert len(tokenizer(prompt)["input_ids"]) <= 120


def test_fit_says_when_even_empty_passages_do_not_fit():
    with pytest.raises(PromptError, match="needs 8 tokens even with its 1 passages empty, but only 7"):
        fit("plain", Words(), "one two three", ["text"], 7)
