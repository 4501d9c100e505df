"""Question sets: which entities each question names and needs, as index lists beside its embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ragkit.gfm.question_rows import (
    FIELDS,
    QuestionError,
    QuestionReport,
    QuestionRow,
    flat_names,
    read_rows,
    read_source,
)
from ragkit.gfm.ragged import Ragged
from ragkit.gfm.tensor_cache import Content, cached, key_of
from ragkit.gfm.text_encoder import TextEncoder, encode, encoder_identity
from ragkit.graph import KnowledgeGraph
from ragkit.graph.names import Names
from ragkit.graph.normalise import v1_name
from ragkit.notes import note

EMPTY = {
    "question_entities": "no question entity in the graph",
    "supporting_entities": "no supporting entity in the graph",
    "supporting_facts": "no supporting document in the graph",
}


@dataclass(frozen=True, eq=False)
class QuestionBatch:
    """B questions, as a model and its losses take them.

    Attributes:
        ids: B ids.
        embeddings: [B, F] float32.
        question_entities, supporting_entities, supporting_documents: B tensors of ids each.
    """

    ids: list[str]
    embeddings: Tensor
    question_entities: list[Tensor]
    supporting_entities: list[Tensor]
    supporting_documents: list[Tensor]


@dataclass(frozen=True, eq=False)
class QuestionSet:
    """Q questions over one graph.

    All columns are aligned: place i of each is the same question, whatever was left out of the file.

    Attributes:
        ids: Q ids, as in the file.
        rows: Q row numbers in the file (v1's sample_id).
        questions: Q texts.
        embeddings: [Q, F] float32.
        question_entities, supporting_entities: Q lists of entity ids.
        supporting_documents: Q lists of document ids.
        is_part: [Q] bool, True for a row marked `sub_question` (MuSiQue's single-hop parts): published scores leave
            them out.
        report: What was left out, and why.
    """

    ids: list[str]
    rows: list[int]
    questions: list[str]
    embeddings: Tensor
    question_entities: Ragged
    supporting_entities: Ragged
    supporting_documents: Ragged
    is_part: Tensor
    report: QuestionReport

    @classmethod
    def load(
        cls,
        source: Any,
        graph: KnowledgeGraph,
        encoder: TextEncoder,
        split: str = "train",
        *,
        v1_names: bool = False,
        cache: bool | str | Path = True,
    ) -> QuestionSet:
        """Reads questions and embeds them.

        A row is used if, of the names that the graph has, there is at least one question entity, one supporting entity
        and one supporting document: GFM-RAG v1's rule. All else is counted in `.report` and printed.

        Args:
            source: A data set's folder (`processed/stage1/train.json`, ...), its stage1, a .json or .jsonl file,
                "small_world", or a list of rows: {id, question, question_entities, supporting_entities,
                supporting_facts}.
            graph: The graph whose entities and documents the rows name.
            encoder: Encodes the questions (side "query").
            split: Which file of a folder.
            v1_names: Bring entity names to v1's normal form first; for a graph that was loaded with `v1_names`.
            cache: True: kept in the user's cache folder; a folder; False: not kept. The key is the content of graph
                and file, and the encoder.

        Raises:
            QuestionError: No such file, invalid JSON, a missing or wrong field (file and row are named), or no row
                that can be used.
        """
        name, content = read_source(source, split)
        identity = "" if cache is False else encoder_identity(encoder)  # costs a forward pass or a look at the weights
        key = key_of("questions", graph.fingerprint, name[-6:], content, str(v1_names), identity)
        tensors, meta = cached(cache, "questions", key, lambda: _make(name, content, graph, encoder, v1_names))
        report = QuestionReport.from_json({**meta["report"], "source": name})
        if not report.ok:
            note(str(report))
        entities, support, documents = (Ragged(tensors[f"{c}.ptr"], tensors[f"{c}.ids"]) for c in FIELDS)
        embeddings = tensors["embeddings"]
        return cls(
            meta["ids"], meta["rows"], meta["questions"], embeddings, entities, support, documents,
            tensors["is_part"].bool(), report,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int] | Tensor) -> QuestionBatch:
        """The questions at these places."""
        places = [int(index) for index in indices]
        return QuestionBatch(
            [self.ids[i] for i in places],
            self.embeddings[torch.tensor(places, dtype=torch.long)],
            self.question_entities.at(places),
            self.supporting_entities.at(places),
            self.supporting_documents.at(places),
        )

    def subset(self, places: Sequence[int] | Tensor) -> QuestionSet:
        """The questions at these places, in this order; the report stays that of the file.

        Raises:
            IndexError: There is no such place.
        """
        chosen = [int(place) for place in places]
        rows = torch.tensor(chosen, dtype=torch.long)
        columns = (self.question_entities, self.supporting_entities, self.supporting_documents)
        entities, support, documents = (Ragged.of(ids.tolist() for ids in column.at(chosen)) for column in columns)
        return QuestionSet(
            [self.ids[i] for i in chosen],
            [self.rows[i] for i in chosen],
            [self.questions[i] for i in chosen],
            self.embeddings[rows],
            entities,
            support,
            documents,
            self.is_part[rows],
            self.report,
        )

    def batches(self, size: int) -> Iterator[QuestionBatch]:
        """All questions in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.batch(range(start, min(start + size, len(self))))

    def __repr__(self) -> str:
        return (
            f"QuestionSet({len(self):,} questions from {self.report.source}, {self.report.num_skipped:,} rows skipped)"
        )


def _make(name: str, content: bytes, graph: KnowledgeGraph, encoder: TextEncoder, v1_names: bool) -> Content:
    report = QuestionReport(name)
    rows = read_rows(name, content, report)
    change = v1_name if v1_names else None
    columns = {
        "question_entities": _link(rows, "question_entities", graph.entities, report, change),
        "supporting_entities": _link(rows, "supporting_entities", graph.entities, report, change),
        "supporting_facts": _link(rows, "supporting_facts", graph.documents, report, None),
    }
    used = []
    for place, row in enumerate(rows):
        empty = next((column for column in FIELDS if not columns[column][place]), None)
        if empty is None:
            used.append(place)
        else:
            report.skip(row.place, EMPTY[empty])
    if not used:
        raise QuestionError(f"no question can be used. {report}")
    kept = [rows[place] for place in used]
    tensors = {"embeddings": encode(encoder, [row.question for row in kept], "query")}
    tensors["is_part"] = torch.tensor([row.is_part for row in kept], dtype=torch.uint8)
    for column, lists in columns.items():
        ragged = Ragged.of(lists[place] for place in used)
        tensors[f"{column}.ptr"], tensors[f"{column}.ids"] = ragged.ptr, ragged.ids
    meta = {
        "ids": [row.id for row in kept],
        "rows": [row.number for row in kept],
        "questions": [row.question for row in kept],
        "report": report.as_json(),
    }
    return tensors, meta


def _link(
    rows: list[QuestionRow], column: str, known: Names, report: QuestionReport, change: Callable[[str], str] | None
) -> list[list[int]]:
    """Ids of each row's names, each once; names that are not known are counted."""
    names = flat_names(rows, column)
    ids = iter(known.ids([change(name) for name in names] if change else names).tolist())
    linked = []
    for row in rows:
        found: dict[int, None] = {}
        for name in row.names[column]:
            identity = next(ids)
            if identity < 0:
                report.unknown(row.place, column, name)
            else:
                found[identity] = None
        linked.append(list(found))
    return linked
