"""Prompt templates: the same one for training and for inference.

A template turns a question and its passages into one string. The response follows the prompt after
`response_prefix`, so that training, scoring and generation agree on where the answer starts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


class PromptError(ValueError):
    """A template that cannot be used, or a prompt that does not fit."""


def _fill(text: str, values: dict[str, str]) -> str:
    """Replaces each `{name}` in one pass, so that braces inside a passage or a question stay as they are."""
    names = "|".join(re.escape(name) for name in values)
    return re.sub(r"\{(" + names + r")\}", lambda match: values[match.group(1)], text)


@dataclass(frozen=True)
class PromptTemplate:
    """How a question and its passages become a prompt.

    Args:
        name: Name shown in configurations and results.
        text: The whole prompt; holds `{question}` and `{passages}` once each.
        passage: One passage; may hold `{n}` (its number from 1), `{title}` and `{text}`.
        separator: Stands between two passages.
        response_prefix: Stands between the prompt and the response, and belongs to the response's tokens.

    Raises:
        PromptError: A placeholder is missing or stands there twice.
    """

    name: str
    text: str
    passage: str = "[{n}] {text}"
    separator: str = "\n"
    response_prefix: str = " "

    def __post_init__(self) -> None:
        for placeholder in ("{question}", "{passages}"):
            found = self.text.count(placeholder)
            if found != 1:
                raise PromptError(
                    f"the prompt template {self.name!r} must hold {placeholder} exactly once, found {found} times"
                )
        if "{text}" not in self.passage:
            raise PromptError(f"the passage format of the prompt template {self.name!r} must hold {{text}}")

    def render(self, question: str, passages: Sequence[Any]) -> str:
        """The prompt for one question.

        Args:
            question: The question as the user wrote it.
            passages: Strings, or objects with `.text` and (optionally) `.title`, best first. With none, the line
                of `{passages}` is left out: a prompt without sources.
        """
        blocks = [
            _fill(self.passage, {"n": str(n), "title": _title(passage), "text": _text(passage)})
            for n, passage in enumerate(passages, start=1)
        ]
        text = self.text if blocks else self.text.replace("{passages}\n", "{passages}")
        return _fill(text, {"passages": self.separator.join(blocks), "question": question})


TEMPLATES: dict[str, PromptTemplate] = {
    # The format that the shipped tiny LM was trained on: one "Passage:" line for each source.
    "plain": PromptTemplate("plain", "{passages}\nQuestion: {question}\nAnswer:", passage="Passage: {text}"),
    # For any LM: says what to do and numbers the sources.
    "sources": PromptTemplate(
        "sources",
        "Answer the question from the sources.\n{passages}\nQuestion: {question}\nAnswer:",
        passage="[{n}] {text}",
    ),
}


def get_template(template: str | PromptTemplate) -> PromptTemplate:
    """The template of that name, or a new one from a text that holds `{question}` and `{passages}`.

    Raises:
        PromptError: Neither a known name nor a usable template text.
    """
    if isinstance(template, PromptTemplate):
        return template
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{" in template or "\n" in template:
        return PromptTemplate("custom", template)
    near = difflib.get_close_matches(template, TEMPLATES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise PromptError(
        f"unknown prompt template {template!r}; {hint}known: {', '.join(TEMPLATES)}; "
        "or give the template text itself, with {question} and {passages} in it"
    )


def fit(
    template: str | PromptTemplate,
    tokenizer: Any,
    question: str,
    passages: Sequence[Any],
    budget_tokens: int,
    *,
    encode: Callable[[str], Sequence[int]] | None = None,
) -> str:
    """The prompt, with the passages cut until it has at most `budget_tokens` tokens.

    The longest passages are cut first, all to one length in characters and back to the end of a word; the
    question, the instruction and the response (which is not part of the prompt) are never touched.

    Args:
        template: Name, text or template.
        tokenizer: A Hugging Face tokenizer; counts tokens as it encodes a prompt, special tokens included.
        question: The question.
        passages: Strings or passages, best first.
        budget_tokens: Most tokens that the prompt may have.
        encode: Turns a prompt into token ids where that is more than `tokenizer(prompt)`, as with a chat template.

    Raises:
        PromptError: The prompt is too long even with all passages empty.
    """
    template = get_template(template)

    def count(prompt: str) -> int:
        return len(encode(prompt) if encode is not None else tokenizer(prompt)["input_ids"])

    prompt = template.render(question, passages)
    if count(prompt) <= budget_tokens:
        return prompt
    # Invariant: with every passage cut to `low` characters the prompt fits, with `high` it does not.
    low, high = 0, max((len(_text(passage)) for passage in passages), default=0)
    best = template.render(question, [_Cut(passage, 0) for passage in passages])
    needed = count(best)
    if needed > budget_tokens:
        raise PromptError(
            f"the prompt needs {needed} tokens even with its {len(passages)} passages empty, "
            f"but only {budget_tokens} are left for it; shorten the question or the template, "
            "use fewer passages, or a model with a longer context"
        )
    while high - low > 1:
        middle = (low + high) // 2
        candidate = template.render(question, [_Cut(passage, middle) for passage in passages])
        if count(candidate) <= budget_tokens:
            low, best = middle, candidate
        else:
            high = middle
    return best


def _text(passage: Any) -> str:
    return passage if isinstance(passage, str) else passage.text


def _title(passage: Any) -> str:
    return "" if isinstance(passage, str) else getattr(passage, "title", "")  # a str has a method of that name


class _Cut:
    """A passage whose text is cut to `length` characters, back to the end of a word."""

    def __init__(self, passage: Any, length: int):
        text = _text(passage)
        if len(text) > length:
            head = text[:length]
            cut_inside_word = not text[length].isspace()
            words_end = max(head.rfind(" "), head.rfind("\n"))
            if cut_inside_word and words_end > 0:  # a text without spaces (Chinese, Thai) is cut where it is
                head = head[:words_end]
            text = head.rstrip()
        self.text = text
        self.title = _title(passage)
