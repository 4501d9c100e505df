"""Training rows of the tiny LM: passages and questions about made entities, "unknown" where no passage tells.

The curriculum in one function of `stage` (share of the training done, 0 to 1): first copying (random repeated tokens,
one or two passages), then several passages that compete (facets of one entity, the same facet of many), and questions
whose answer is not there.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from ragkit.small_world.synthetic import entity, entity_name, generic_passage
from ragkit.small_world.templates import BRIDGES, KINDS, Fields, write_passage

UNKNOWN = "unknown"
PAD, BOS, EOS = 0, 1, 2
Encode = Callable[[str], list[int]]
Asked = tuple[str, str]  # question, answer


def _ask(rng: random.Random, kind: str, name: str, field: str) -> str:
    return rng.choice(KINDS[kind].questions(field)).text.format(e=name)


def _one_entity(rng: random.Random, count: int, unknown: float) -> tuple[list[str], list[Asked]]:
    """Facets of one entity; the facets left out are asked for too, and the answer is "unknown"."""
    kind, name, fields = entity(rng)
    facets = list(range(len(KINDS[kind].facets)))
    rng.shuffle(facets)
    told, untold = facets[:count], facets[count:]
    other = entity_name(rng, kind)
    passages = [write_passage(rng, kind, name, fields, f, other) for f in told]
    asked = _questions(rng, kind, name, fields, told, [other], unknown)
    if untold and rng.random() < unknown:
        field = rng.choice(KINDS[kind].facets[rng.choice(untold)])
        asked.append((_ask(rng, kind, name, field), UNKNOWN))
    return passages, asked


def _one_facet(rng: random.Random, count: int, unknown: float) -> tuple[list[str], list[Asked]]:
    """The same facet of several entities: only the name tells them apart; at times they share the value."""
    kind, _, _ = entity(rng)
    members = [entity(rng, kind)[1:] for _ in range(count)]
    facet = rng.randrange(len(KINDS[kind].facets))
    for field in KINDS[kind].facets[facet]:
        if rng.random() < 0.25:
            for _, fields in members[1:]:
                fields[field] = members[0][1][field]
    passages, asked = [], []
    for number, (name, fields) in enumerate(members):
        other = members[number - 1][0] if count > 1 and rng.random() < 0.5 else entity_name(rng, kind)
        passages.append(write_passage(rng, kind, name, fields, facet, other))
        asked += _questions(rng, kind, name, fields, [facet], [other] if count == 1 else [], unknown)
    return passages, asked


def _questions(
    rng: random.Random, kind: str, name: str, fields: Fields, facets: list[int], others: list[str], unknown: float
) -> list[Asked]:
    """A question per told field, and with probability `unknown` its twin about an entity that no passage describes."""
    asked = []
    for facet in facets:
        for field in KINDS[kind].facets[facet]:
            for question in rng.sample(KINDS[kind].questions(field), rng.choice((1, 1, 2))):
                asked.append((question.text.format(e=name), fields[field]))
            if rng.random() < unknown:
                absent = rng.choice(others) if others and rng.random() < 0.3 else entity_name(rng, kind)
                asked.append((_ask(rng, kind, absent, field), UNKNOWN))
    return asked


def _bridge(rng: random.Random, unknown: float) -> tuple[list[str], list[Asked]]:
    """Two linked entities and a two-hop question; "unknown" if the passage in the middle is missing."""
    bridge = rng.choice(BRIDGES)
    _, middle, target = entity(rng, bridge.target)
    _, name, fields = entity(rng, bridge.kind)
    fields[bridge.link] = middle
    first = KINDS[bridge.kind].facet_of(bridge.link)
    second = KINDS[bridge.target].facet_of(bridge.field)
    passages = [
        write_passage(rng, bridge.kind, name, fields, first, entity_name(rng, bridge.kind)),
        write_passage(rng, bridge.target, middle, target, second, entity_name(rng, bridge.target)),
    ]
    question = bridge.text.format(e=name)
    if rng.random() < unknown:
        return [passages[rng.randrange(2)]], [(question, UNKNOWN)]
    return passages, [
        (question, target[bridge.field]),
        (_ask(rng, bridge.target, middle, bridge.field), target[bridge.field]),
    ]


def scene(rng: random.Random, stage: float, most: int = 4) -> tuple[list[str], list[Asked]]:
    """Passages in random order and questions on them, as hard as `stage` allows."""
    late = stage >= 0.2
    unknown = 0.0 if stage < 0.3 else 0.5
    wanted = rng.randint(1, most if late else 2)
    passages: list[str] = []
    asked: list[Asked] = []
    while len(passages) < wanted:
        room = wanted - len(passages)
        draw = rng.random()
        if draw < (0.4 if not late and stage < 0.15 else 0.08):
            text, questions = generic_passage(rng)
            new = [text]
        elif draw < 0.15 and stage >= 0.4 and room >= 2:
            new, questions = _bridge(rng, unknown)
        elif draw < 0.6:
            new, questions = _one_entity(rng, min(room, rng.choice((1, 2, 3))), unknown)
        else:
            new, questions = _one_facet(rng, min(room, rng.choice((1, 2, 3))), unknown)
        passages += new
        asked += questions
    rng.shuffle(passages)
    rng.shuffle(asked)
    return passages, asked


def prompt_text(passages: list[str], question: str) -> str:
    """The native format: what `ragkit.prompts.TEMPLATES["plain"]` renders (a test holds them together)."""
    return "\n".join(f"Passage: {p}" for p in passages) + f"\nQuestion: {question}\nAnswer:"


def row(rng: random.Random, encode: Encode, length: int, stage: float, vocabulary: int) -> tuple[list[int], list[int]]:
    """One training row of at most `length` tokens: token ids, and 1 where the token belongs to an answer."""
    if rng.random() < (0.5 if stage < 0.08 else 0.1 if stage < 0.2 else 0.02):
        return _repetition(rng, length, vocabulary)
    ids, weights = [BOS], [0]
    while len(ids) < length - 90:  # room for one more small scene: tokens that teach nothing cost as much as others
        passages, asked = scene(rng, stage)
        text = encode(("\n" if len(ids) > 1 else "") + "\n".join(f"Passage: {p}" for p in passages))
        ids += text
        weights += [0] * len(text)
        for question, answer in asked[:8]:
            before = encode(f"\nQuestion: {question}\nAnswer:")
            after = [*encode(f" {answer}"), EOS]
            if len(ids) + len(before) + len(after) > length:
                return ids[:length], weights[:length]
            ids += before + after
            weights += [0] * len(before) + [1] * len(after)
    return ids[:length], weights[:length]


def _repetition(rng: random.Random, length: int, vocabulary: int) -> tuple[list[int], list[int]]:
    """Random tokens, then pieces of them again: pure copying."""
    pattern = [rng.randint(3, vocabulary - 1) for _ in range(rng.randint(8, 60))]
    ids, weights = [BOS, *pattern], [0] * (len(pattern) + 1)
    while len(ids) < length:
        piece = pattern[rng.randint(0, len(pattern) // 2) :]
        ids += piece
        weights += [0] + [1] * (len(piece) - 1)
    return ids[:length], weights[:length]
