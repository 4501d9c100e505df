"""Which linker the settings name, and questions whose entities it finds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ragkit.gfm.entity_search import EntitySearch
from ragkit.gfm.fact_search import FactLinker, FactSearch
from ragkit.gfm.questions import QuestionSet
from ragkit.gfm.ragged import Ragged
from ragkit.gfm.text_encoder import TextEncoder
from ragkit.graph import KnowledgeGraph
from ragkit.graph.link import EntityLinker


def make_linker(
    kind: str, graph: KnowledgeGraph, encoder: TextEncoder, top_facts: int = 3, cache: bool | str | Path = True
) -> Any:
    """The linker of the setting `datasets.link`.

    Args:
        kind: "names", an `EntityLinker` by strings and embeddings; "facts", a `FactLinker` over it.
        graph: Its entities are linked to.
        encoder: For the embeddings.
        top_facts: Facts for each question.
        cache: As in `TextIndex`.
    """
    linker = EntityLinker(graph, EntitySearch(graph, encoder, cache))
    if kind == "names":
        return linker
    if kind == "facts":
        return FactLinker(linker, FactSearch(graph, encoder, cache), top_facts)
    raise ValueError(f"kind: found {kind!r}, expected names or facts")


def relinked(questions: QuestionSet, linker: Any) -> QuestionSet:
    """The same questions with the entities that a linker finds; where it finds none, their own."""
    lists = [[link.id for link in links] for links in linker.link(questions.questions)]
    lists = [found or questions.question_entities[i].tolist() for i, found in enumerate(lists)]
    return dataclasses.replace(questions, question_entities=Ragged.of(lists))
