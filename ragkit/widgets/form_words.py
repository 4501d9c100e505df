"""What a form says: which settings stand first, what is wrong in words, and what it holds without widgets."""

from __future__ import annotations

from collections.abc import Sequence

from ragkit.config import Config, GFMFinetuneConfig, GFMPretrainConfig, LSRConfig, Problem, RALTConfig
from ragkit.widgets.base import BORDER, TEXT, escape

# What people change first; it stands at the top of the form, all other settings in groups below.
FIRST: dict[type[Config], list[str]] = {
    LSRConfig: [
        "data.corpus",
        "data.max_train",
        "rag.retriever",
        "rag.generator",
        "top_k",
        "gamma",
        "beta",
        "train.max_steps",
        "train.batch_size",
        "train.learning_rate",
    ],
    RALTConfig: [
        "data.corpus",
        "data.max_train",
        "rag.generator",
        "method",
        "lora_r",
        "context",
        "top_k",
        "train.max_steps",
        "train.batch_size",
        "train.learning_rate",
    ],
    GFMPretrainConfig: [
        "datasets.train_names",
        "model.entity_model.input_dim",
        "model.entity_model.hidden_dims",
        "task.num_negative",
        "train.max_steps",
        "train.batch_size",
        "optimizer.lr",
    ],
    GFMFinetuneConfig: [
        "datasets.train_names",
        "train.checkpoint",
        "model.entity_model.input_dim",
        "model.entity_model.hidden_dims",
        "doc_ranker.name",
        "train.max_steps",
        "train.batch_size",
        "optimizer.lr",
    ],
}


def problem_words(problem: Problem, with_key: bool) -> str:
    """A problem as it is told in a form."""
    found = "nothing" if problem.found in ("", None, [], {}) else f'"{problem.found}"'
    if found == "nothing" and " or null" in problem.expected:
        wanted = problem.expected.replace(" or null", "")
        text = f'found nothing, expected {wanted}; to leave it open, take away the tick "set"'
    elif found != "nothing" and isinstance(problem.found, dict | list | Config):
        text = problem.expected  # several settings that do not fit each other: what is in them is shown anyway
    else:
        text = f"found {found}, expected {problem.expected}"
    return f"{problem.key}: {text}" if with_key else text


def changes_html(title: str, rows: Sequence[tuple[str, str]], note: str) -> str:
    """The changed settings as a table, under a title and over a note."""
    style = f"text-align: left; padding: 2px 12px 2px 0; border-bottom: 1px solid {BORDER}"
    lines = "".join(
        f'<tr><th scope="row" style="{style}; font-weight: normal"><code>{escape(key)}</code></th>'
        f'<td style="{style}">{escape(value)}</td></tr>'
        for key, value in rows
    )
    head = f'<tr><th scope="col" style="{style}">setting</th><th scope="col" style="{style}">value</th></tr>'
    table = f'<table style="border-collapse: collapse">{head}{lines}</table>' if rows else "<p>Nothing is changed.</p>"
    return f'<div style="color: {TEXT}"><p><b>{escape(title)}</b></p>{table}<p><i>{escape(note)}</i></p></div>'
