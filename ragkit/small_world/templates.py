"""How the small world talks: passages by facet, lures, fillers and question templates for each kind of entity.

An entity has fields (facts). A facet is one passage that tells some of them; the other facets of the same entity
are its natural distractors, because they name it and, through a lure, the asked topic, but not the value.
The sentences are in `templates.yaml`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import yaml

PLAIN, OBLIQUE = "plain", "oblique"
Fields = dict[str, str]


@dataclass(frozen=True)
class Relation:
    """One fact about an entity.

    Attributes:
        topic: How a lure speaks of the fact without telling it.
        sentences: Ways to state it.
        plain: Questions that use the topic's own words; the last one is held out of the tuning questions.
        oblique: Questions that do not; the last one is held out of the tuning questions.
    """

    topic: str
    sentences: tuple[str, ...]
    plain: tuple[str, ...]
    oblique: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """One way to ask for a field."""

    text: str
    style: str
    held_out: bool


@dataclass(frozen=True)
class Kind:
    """One kind of entity: its passages (facets) and what may be asked."""

    facets: tuple[tuple[str, ...], ...]
    relations: dict[str, Relation]

    def questions(self, field: str) -> list[Question]:
        """All question templates of a field, plain ones first."""
        relation = self.relations[field]
        styles = ((PLAIN, relation.plain), (OBLIQUE, relation.oblique))
        return [Question(t, style, t == texts[-1]) for style, texts in styles for t in texts]

    def facet_of(self, field: str) -> int:
        """Number of the facet that tells `field`."""
        return next(i for i, facet in enumerate(self.facets) if field in facet)


@dataclass(frozen=True)
class Bridge:
    """A two-hop question: the value of `link` names an entity of kind `target`, which is asked for `field`."""

    kind: str
    link: str
    target: str
    field: str
    text: str


def _read(file: Path) -> tuple[dict[str, Kind], tuple[Bridge, ...], dict[str, tuple[str, ...]]]:
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    kinds = {}
    for name, spec in raw.pop("kinds").items():
        relations = {
            field: Relation(r["topic"], tuple(r["sentences"]), tuple(r["plain"]), tuple(r["oblique"]))
            for field, r in spec["relations"].items()
        }
        kinds[name] = Kind(tuple(tuple(f) for f in spec["facets"]), relations)
    bridges = tuple(Bridge(**b) for b in raw.pop("bridges"))
    return kinds, bridges, {key: tuple(texts) for key, texts in raw.items()}


KINDS, BRIDGES, _AROUND = _read(Path(__file__).with_name("templates.yaml"))
FILLERS, LURES, NEIGHBOURS = _AROUND["fillers"], _AROUND["lures"], _AROUND["neighbours"]


def write_passage(
    rng: random.Random,
    kind: str,
    entity: str,
    fields: Fields,
    facet: int,
    other: str | None = None,
    lure: float = 0.7,
    filler: float = 0.4,
    neighbour: float = 0.25,
) -> str:
    """One passage: the facet's facts, and around them a lure, a filler and the name of another entity.

    Args:
        rng: Source of every choice.
        kind: A key of `KINDS`.
        entity: The entity's name.
        fields: Its facts.
        facet: Number of the facet to tell.
        other: Another entity of the same kind, named in passing.
        lure: Probability of a sentence that names a topic of another facet without its value.
        filler: Probability of a sentence that tells nothing.
        neighbour: Probability of a sentence that names `other`.
    """
    spec = KINDS[kind]
    told = spec.facets[facet]
    facts = [
        rng.choice(spec.relations[f].sentences).format(e=entity, v=fields[f], **fields)
        for f in told
        if spec.relations[f].sentences
    ]
    around = []
    untold = [f for f in spec.relations if f not in told]
    if untold and rng.random() < lure:
        around.append(rng.choice(LURES).format(t=spec.relations[rng.choice(untold)].topic, e=entity))
    if rng.random() < filler:
        around.append(rng.choice(FILLERS).format(e=entity))
    if other is not None and rng.random() < neighbour:
        around.append(rng.choice(NEIGHBOURS).format(o=other))
    rng.shuffle(around)
    cut = rng.randint(0, len(around))  # the facts stay together: "That was in the year" leans on the sentence before
    return " ".join([*around[:cut], *facts, *around[cut:]])
