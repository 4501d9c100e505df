"""A graph's facts for link prediction: which are true, wrong ones beside them, and some that are held out.

Triples are [B, 3] int64 (head, tail, relation), as `QueryGNN` takes them. R counts relations with their inverses;
the inverse of relation r is r + R/2, so a question for a head is one for a tail: (tail, inverse relation, ?).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ragkit.gfm.easy_edges import inverse
from ragkit.gfm.ragged import Ragged
from ragkit.graph import KnowledgeGraph

COLUMNS = ("head", "tail", "relation")
MANY = 1 << 62  # a number below it, modulo n, favours no remainder by more than n / 2^62


def graph_triples(graph: KnowledgeGraph) -> Tensor:
    """[T, 3] int64 (head, tail, relation) of a graph's triples, in their order; those that stand twice stay twice."""
    columns = [torch.from_numpy(getattr(graph, name)).long() for name in COLUMNS]
    return torch.stack(columns, 1)  # 3 x [T] -> [T, 3]


class TrueTriples:
    """Looks up which tails are true for (head, relation), in both directions.

    Built once: the facts and their inverses, each once, sorted by (head, relation, tail) as CSR. A look-up is a binary
    search; nothing is sorted, and nothing of size queries × N is made, where it is asked. Lives on the CPU.

    Args:
        triples: [T, 3] facts (head, tail, relation).
        num_entities: N.
        num_relations: R, inverse relations included.

    Raises:
        ValueError: Ids out of range, or an odd R.

    Example:
        >>> index = TrueTriples(torch.tensor([[0, 1, 0], [0, 2, 0]]), num_entities=3, num_relations=2)
        >>> index.true_tails(torch.tensor([0, 2]), torch.tensor([0, 1])).at([0, 1])
        [tensor([1, 2]), tensor([0])]
    """

    def __init__(self, triples: Tensor, num_entities: int, num_relations: int) -> None:
        if num_entities < 1 or num_relations < 2 or num_relations % 2:
            raise ValueError(
                f"found {num_entities} entities and {num_relations} relations, expected at least one entity, and an "
                "inverse r + R/2 for each relation r"
            )
        self.num_entities, self.num_relations = num_entities, num_relations
        head, tail, rel = self.check(triples).unbind(1)
        pair = torch.cat([head * num_relations + rel, tail * num_relations + inverse(rel, num_relations)])
        # Two steps, since (head, relation, tail) as one number may not fit int64; (place of the pair, tail) does.
        pairs, place = torch.unique(pair, return_inverse=True)
        self._keys = torch.unique(place * num_entities + torch.cat([tail, head]))  # [M] ascending, each fact once
        place = self._keys // num_entities
        # After the P pairs comes an empty one, which stands for every pair that has no fact.
        self._pairs = torch.cat([pairs, torch.tensor([torch.iinfo(torch.int64).max])])  # [P + 1] ascending
        counts = torch.bincount(place, minlength=len(self._pairs))
        self._ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])  # [P + 2]
        self._tails = self._keys % num_entities  # [M]
        # The j-th true tail t_j of a query has t_j - j wrong ones before it.
        self._wrong_before = self._keys - (torch.arange(len(self._keys)) - self._ptr[place])  # [M] ascending

    @classmethod
    def of(cls, graph: KnowledgeGraph, *more: Tensor) -> TrueTriples:
        """All facts of a graph.

        Args:
            graph: The graph; for one that held-out triples were taken from, the whole one, or give those as `more`.
            more: [V, 3] further facts (head, tail, relation) in the graph's ids.
        """
        return cls(torch.cat([graph_triples(graph), *more]), graph.num_entities, 2 * graph.num_relations)

    def check(self, triples: Tensor, name: str = "triples") -> Tensor:
        """The triples as int64 on the CPU.

        Raises:
            ValueError: They are not [B, 3] integers, or an id is out of range.
        """
        if triples.ndim != 2 or triples.shape[1] != 3 or triples.is_floating_point() or triples.dtype == torch.bool:
            raise ValueError(
                f"{name}: expected integer [B, 3] (head, tail, relation), found {triples.dtype} {list(triples.shape)}"
            )
        triples = triples.to("cpu", torch.int64)
        limits = torch.tensor([self.num_entities, self.num_entities, self.num_relations])
        wrong = (triples < 0) | (triples >= limits)
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{name}, row {row}: {COLUMNS[column]} {int(triples[row, column])} is not in "
                f"0 ... {int(limits[column]) - 1}"
            )
        return triples

    def count(self, head: Tensor, relation: Tensor) -> Tensor:
        """Number of true tails of each query, any shape; `head` and `relation` int64 ids of that shape."""
        place = self._place(head, relation)
        return self._ptr[place + 1] - self._ptr[place]

    def true_tails(self, head: Tensor, relation: Tensor) -> Ragged:
        """The true tails of Q queries.

        Args:
            head: [Q] int64 ids.
            relation: [Q] int64 ids, of relations or inverse relations.

        Returns:
            Q lists, ascending, each tail once; empty where there is no such fact.

        Raises:
            ValueError: Ids out of range.
        """
        place = self._place(head, relation)
        first, count = self._ptr[place], self._ptr[place + 1] - self._ptr[place]
        ptr = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])
        within = torch.arange(int(ptr[-1])) - ptr[:-1].repeat_interleave(count)
        return Ragged(ptr, self._tails[first.repeat_interleave(count) + within])

    def contains(self, head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
        """Whether each (head, relation, tail) is a fact, or the inverse of one; bool of the ids' shape.

        Raises:
            ValueError: Ids out of range.
        """
        _within("tail", tail, self.num_entities)
        key = self._place(head, relation) * self.num_entities + tail
        if not len(self._keys):
            return torch.zeros_like(key, dtype=torch.bool)
        return self._keys[torch.searchsorted(self._keys, key).clamp(max=len(self._keys) - 1)] == key

    def wrong_tail(self, head: Tensor, relation: Tensor, number: Tensor) -> Tensor:
        """The entities that are no true tails, in ascending order: the `number`-th for each query.

        A query with c true tails has N - c of them. With j of the true tails t_0 < t_1 < ... before it, entity e is
        number e - j; and j is how many of the t_i - i (they ascend) are not above the number.

        Args:
            head, relation: int64 ids of one shape.
            number: int64 of that shape, from 0 to below N - `count(head, relation)`.

        Raises:
            ValueError: Ids or numbers out of range.
        """
        place = self._place(head, relation)
        first, end = self._ptr[place], self._ptr[place + 1]
        if ((number < 0) | (number >= self.num_entities - (end - first))).any():
            raise ValueError("number: there are fewer wrong tails than that; see count()")
        before = torch.searchsorted(self._wrong_before, place * self.num_entities + number, right=True) - first
        return number + before

    def _place(self, head: Tensor, relation: Tensor) -> Tensor:
        """Place of each pair among the P pairs; P for one without a fact."""
        _within("head", head, self.num_entities)
        _within("relation", relation, self.num_relations)
        pair = head * self.num_relations + relation
        place = torch.searchsorted(self._pairs, pair)
        return torch.where(self._pairs[place] == pair, place, len(self._pairs) - 1)


def _within(name: str, ids: Tensor, limit: int) -> None:
    wrong = (ids < 0) | (ids >= limit)
    if wrong.any():
        raise ValueError(f"{name}: id {int(ids[wrong][0])} is not in 0 ... {limit - 1}")


def corrupt(
    triples: Tensor, index: TrueTriples, num_negative: int, strict: bool, generator: torch.Generator
) -> Tensor:
    """Sets wrong triples beside true ones: the batch of `QueryGNN.forward`.

    As in GFM-RAG v1 the first half of the rows gets other tails, the second half other heads. With an odd B the row in
    the middle (for B = 1 the only one) gets either by a coin of the generator; v1 always gives it other heads.

    Args:
        triples: [B, 3] facts (head, tail, relation); relations may be inverse ones.
        index: All true facts.
        num_negative: Wrong triples for each true one, drawn with replacement; v1's default is 256.
        strict: Draw evenly from the entities that make no true fact. False: evenly from all entities but the
            positive's own, so other true facts may be among the negatives.
        generator: On the CPU; the only source of chance, so equal states give equal batches.

    Returns:
        [B, 1 + num_negative, 3] int64; the first of a row is its triple, which is never among its negatives.
        With `strict`, a row for whose question every entity is a true answer is asked for the other end.

    Raises:
        ValueError: Ids out of range; with `strict` a triple that `index` does not have, or one for which neither end
            has a wrong entity; without it, a graph of one entity.
    """
    if num_negative < 1:
        raise ValueError(f"num_negative: expected 1 or more, found {num_negative}")
    triples = index.check(triples)
    B, N = len(triples), index.num_entities
    head, tail, rel = triples.unbind(1)  # [B] each
    back = inverse(rel, index.num_relations)
    coin = int(torch.randint(2, (1,), generator=generator))
    other_tails = torch.arange(B) < (B + coin) // 2  # [B]; the coin counts for odd B alone
    if strict:
        unknown = ~index.contains(head, rel, tail)
        if unknown.any():
            raise ValueError(_row(triples, unknown, "is not in the index of true facts; build that with this triple"))
        free_tails, free_heads = N - index.count(head, rel), N - index.count(tail, back)
        other_tails = torch.where(other_tails, free_tails > 0, free_heads == 0)
        free = torch.where(other_tails, free_tails, free_heads)
    else:
        free = torch.full((B,), N - 1)
    if (free == 0).any():
        raise ValueError(
            _row(triples, free == 0, f"has no negatives: each of the {N} entities makes a true triple of it")
        )
    kept = torch.where(other_tails, head, tail)  # [B] the end that stays
    gold = torch.where(other_tails, tail, head)
    number = torch.randint(MANY, (B, num_negative), generator=generator) % free[:, None]  # [B, K]
    if strict:
        asked = torch.where(other_tails, rel, back)
        wrong = index.wrong_tail(kept[:, None].expand_as(number), asked[:, None].expand_as(number), number)
    else:
        wrong = number + (number >= gold[:, None]).long()
    batch = triples[:, None].repeat(1, 1 + num_negative, 1)  # [B, 3] -> [B, 1 + K, 3]
    batch[:, 1:, 0] = torch.where(other_tails[:, None], head[:, None], wrong)
    batch[:, 1:, 1] = torch.where(other_tails[:, None], wrong, tail[:, None])
    return batch


def _row(triples: Tensor, bad: Tensor, what: str) -> str:
    row = int(bad.nonzero()[0])
    return f"triples, row {row}: (head, tail, relation) = {tuple(triples[row].tolist())} {what}"


def hold_out(graph: KnowledgeGraph, share: float, seed: int, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Takes facts out of a graph at random, to test with.

    The different facts are put in random order; the first fact of each entity stays, and of the others the last are
    held out. So every entity with an edge keeps one, and a triple that stands twice is on one side. What says nearly
    the same (the fact turned round, or another relation of the pair) may stay.

    Args:
        graph: The graph.
        share: Share of the different facts to hold out, from 0 to below 1.
        seed: Equal seeds hold out equal facts of equal graphs.
        most: Hold out at most so many.

    Returns:
        keep: [T] bool, False at each copy of a held-out fact; `graph.with_triples(keep)` is the training graph.
        held: [V, 3] int64, each fact once, in the graph's order. Where too few facts can be spared V is less than
        asked for, and a warning says so.

    Raises:
        ValueError: A share out of range, or a negative `most`.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share: expected 0 or more and less than 1, found {share}")
    if most is not None and most < 0:
        raise ValueError(f"most: expected 0 or more, found {most}")
    triples = graph_triples(graph)
    fact, F = _facts(triples, graph.num_entities, graph.num_relations)  # [T] -> which of the F different facts
    head, tail = _of_facts(triples, fact, F)[:, :2].unbind(1)  # [F] each
    order = torch.randperm(F, generator=torch.Generator().manual_seed(seed))
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(F))  # [F] each fact's place in the random order
    first = torch.full((graph.num_entities,), F)
    first.scatter_reduce_(0, torch.cat([head, tail]), torch.cat([rank, rank]), "amin")  # [N]
    spared = (rank > first[head]) & (rank > first[tail])
    wanted = round(share * F) if most is None else min(most, round(share * F))
    chosen = order[spared[order]]  # in random order
    held = torch.zeros(F, dtype=torch.bool)
    held[chosen[max(0, len(chosen) - wanted) :]] = True
    if len(chosen) < wanted:
        warnings.warn(
            f"{len(chosen)} of {F} facts are held out instead of {wanted}: the others are needed so that every entity "
            "keeps an edge",
            stacklevel=2,
        )
    return ~held[fact], _of_facts(triples, fact, F)[held]


def _facts(triples: Tensor, N: int, R: int) -> tuple[Tensor, int]:
    """For each of T triples the number of its fact, counted as they are first seen; and how many there are."""
    head, tail, rel = triples.unbind(1)
    _, pair = torch.unique(head * R + rel, return_inverse=True)
    keys, place = torch.unique(pair * N + tail, return_inverse=True)
    F, T = len(keys), len(triples)
    seen = torch.full((F,), T).scatter_reduce_(0, place, torch.arange(T), "amin")  # [F] first row of each
    number = torch.empty_like(seen).scatter_(0, seen.argsort(), torch.arange(F))
    return number[place], F


def _of_facts(triples: Tensor, fact: Tensor, F: int) -> Tensor:
    """[F, 3] one triple of each fact."""
    rows: Any = torch.empty(F, 3, dtype=torch.int64)
    rows[fact] = triples  # equal facts have equal triples
    return rows
