"""Facts of a graph by the nearness of their words to a question, and the entities that they add to it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ragkit.gfm.text_encoder import TextEncoder
from ragkit.gfm.text_index import TextIndex
from ragkit.graph import KnowledgeGraph
from ragkit.graph.link import LinkedEntity

SAME = "equivalent"  # GFM-RAG's relation between names that look alike: no fact


class FactSearch(TextIndex):
    """Finds the facts of a graph whose words, "head relation tail", are nearest to given texts, by cosine.

    Args:
        graph: Its triples are searched, each once, without the relation "equivalent".
        encoder, cache: As in `TextIndex`.
        embeddings: [M, F] of length 1, where they are known already.

    Attributes:
        facts: [M, 3] int32 (head, relation, tail) ids, ascending.
    """

    def __init__(
        self,
        graph: KnowledgeGraph,
        encoder: TextEncoder,
        cache: bool | str | Path = True,
        embeddings: Tensor | None = None,
    ) -> None:
        facts = np.unique(np.stack([graph.head, graph.relation, graph.tail], axis=1), axis=0)
        same = int(graph.relations.ids([SAME])[0])
        self.facts = facts[facts[:, 1] != same]
        state = hashlib.blake2b(self.facts.tobytes(), digest_size=16)
        graph.entities.update_hash(state)
        graph.relations.update_hash(state)
        super().__init__(len(self.facts), self._words, "facts", state.digest(), encoder, cache, embeddings)
        self.graph = graph

    def _words(self, start: int, end: int) -> list[str]:
        entities, relations = self.graph.entities, self.graph.relations
        return [f"{entities[h]} {relations[r]} {entities[t]}" for h, r, t in self.facts[start:end].tolist()]


class FactLinker:
    """Adds to the entities that another linker finds those of the facts nearest to the question.

    A question often says what its answer is about in words that are no name ("the director of ..."); the facts whose
    words are near lead there. In the manner of HippoRAG 2's query-to-triple linking (Gutierrez et al. 2025,
    arXiv:2502.14802), without its filter by a language model.

    Args:
        linker: Anything with `link(questions)`, such as an `EntityLinker`.
        facts: The search.
        top_facts: Facts for each question.
    """

    def __init__(self, linker: Any, facts: FactSearch, top_facts: int = 3) -> None:
        if top_facts < 1:
            raise ValueError(f"top_facts: expected a whole number from 1, found {top_facts}")
        self.linker, self.facts, self.top_facts = linker, facts, top_facts

    def link(self, questions: Sequence[str]) -> list[list[LinkedEntity]]:
        """The other linker's entities, then the heads and tails of the nearest facts (`how` is "fact"), each once."""
        found: list[list[LinkedEntity]] = self.linker.link(questions)
        open_questions = [i for i, question in enumerate(questions) if question.strip()]
        if not open_questions or not len(self.facts.facts):
            return found
        cosines, places = self.facts([questions[i] for i in open_questions], self.top_facts)
        entities = self.facts.graph.entities
        for row, near, nearest in zip(open_questions, cosines.tolist(), places.tolist(), strict=True):
            links = {link.id: link for link in found[row]}
            for cosine, place in zip(near, nearest, strict=True):
                head, _, tail = self.facts.facts[place].tolist()
                for entity in (head, tail):
                    links.setdefault(entity, LinkedEntity(entity, entities[entity], questions[row], "fact", cosine))
            found[row] = list(links.values())
        return found
