"""How the small world talks: passages by facet, lures, fillers and question templates for each kind of entity.

An entity has fields (facts). A facet is one passage that tells some of them; the other facets of the same entity
are its natural distractors, because they name it and, through a lure, the asked topic, but not the value.
`{e}` is the entity, `{v}` the value, any other name in braces another field of the same entity.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

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


COUNTRY = Kind(
    facets=(("capital", "continent"), ("currency",), ("language",), ("peak",), ("domain", "calling_code")),
    relations={
        "capital": Relation(
            "capital",
            (
                "{v} is the capital of {e}.",
                "The government of {e} sits in {v}.",
                "The parliament of {e} meets in {v}.",
            ),
            ("What is the capital of {e}?", "Which city is the capital of {e}?", "What capital does {e} have?"),
            (
                "Where would a lawmaker from {e} go to work?",
                "In which city does the government of {e} sit?",
                "Ambassadors sent to {e} settle in which city?",
            ),
        ),
        "continent": Relation(
            "location",
            ("{e} is a country in {v}.", "{e} lies in {v}.", "On the map {e} belongs to {v}."),
            ("On which continent is {e}?", "On which continent does {e} lie?", "What is the continent of {e}?"),
            (
                "Where on the globe should I look for {e}?",
                "Which part of the world is {e} in?",
                "On which great landmass does {e} lie?",
            ),
        ),
        "currency": Relation(
            "currency",
            (
                "People in {e} pay with the {v}.",
                "The currency of {e} is the {v}.",
                "Prices in {e} are given in the {v}.",
            ),
            (
                "What is the currency of {e}?",
                "Which currency does {e} have?",
                "What is the name of the currency of {e}?",
            ),
            (
                "What do shoppers in {e} carry in their wallets?",
                "What would a bank teller in {e} count?",
                "A salary in {e} is paid in what?",
            ),
        ),
        "language": Relation(
            "language",
            ("Most people in {e} speak {v}.", "The main language of {e} is {v}.", "Schools in {e} teach in {v}."),
            (
                "What is the main language of {e}?",
                "What language is spoken in {e}?",
                "Which language do people speak in {e}?",
            ),
            (
                "In what would a newspaper from {e} be written?",
                "Which phrase book should a tourist pack for {e}?",
                "How do neighbours in {e} greet each other, in what tongue?",
            ),
        ),
        "peak": Relation(
            "highest mountain",
            (
                "The highest mountain of {e} is {v}.",
                "{v} is the tallest peak in {e}.",
                "No summit in {e} is higher than {v}.",
            ),
            (
                "What is the highest mountain of {e}?",
                "Which mountain is the highest in {e}?",
                "What is the tallest peak in {e}?",
            ),
            (
                "From where can one look down on all of {e}?",
                "Which summit would an alpinist in {e} choose?",
                "What should I climb to stand above everyone in {e}?",
            ),
        ),
        "domain": Relation(
            "web address",
            (
                "Web addresses from {e} end in {v}.",
                "The internet domain of {e} is {v}.",
                "Sites in {e} carry the ending {v}.",
            ),
            (
                "What is the internet domain of {e}?",
                "In what do web addresses from {e} end?",
                "Which ending do web addresses in {e} have?",
            ),
            (
                "Which two letters close the link of a shop in {e}?",
                "What stands after the last dot of a site from {e}?",
                "A hotel in {e} puts its page under which ending?",
            ),
        ),
        "calling_code": Relation(
            "calling code",
            (
                "The calling code of {e} is {v}.",
                "To phone {e} from abroad one dials {v}.",
                "Phone numbers in {e} begin with the code {v}.",
            ),
            (
                "What is the calling code of {e}?",
                "Which calling code does {e} have?",
                "What is the phone code of {e}?",
            ),
            (
                "What do I dial before a number in {e}?",
                "Which digits lead a phone call to {e}?",
                "With what does a foreign call to {e} start?",
            ),
        ),
    },
)

PERSON = Kind(
    facets=(
        ("birth_city", "birth_country", "birth_year"),
        ("known_for",),
        ("institution",),
        ("death_city", "death_year"),
    ),
    relations={
        "birth_city": Relation(
            "birthplace",
            (
                "{e} was born in {v}, in what is now {birth_country}.",
                "The childhood home of {e} was in {v}, {birth_country}.",
                "{e} came into the world in {v}, a place in {birth_country}.",
            ),
            ("In which city was {e} born?", "What is the birthplace of {e}?", "In which town was {e} born?"),
            (
                "Where did the parents of {e} raise a baby?",
                "Which town did {e} come from?",
                "Where did {e} first see the light?",
            ),
        ),
        "birth_country": Relation(
            "country of birth",
            (),  # told by the sentence of the birth city
            (
                "In which country was {e} born?",
                "What is the country of birth of {e}?",
                "Which country was {e} born in?",
            ),
            (
                "From which land did {e} come?",
                "Which nation may call {e} its child?",
                "Which country counts {e} among its natives?",
            ),
        ),
        "birth_year": Relation(
            "year of birth",
            ("The year of birth was {v}.", "That was in the year {v}.", "The family kept the date, {v}."),
            ("In which year was {e} born?", "What is the year of birth of {e}?", "When was {e} born?"),
            (
                "How far back do we go to find {e} as a baby?",
                "When did the life of {e} begin?",
                "When could one have met {e} in a cradle?",
            ),
        ),
        "known_for": Relation(
            "main work",
            (
                "{e} is known for {v}.",
                "The great work of {e} was {v}.",
                "{e} became famous for {v}.",
            ),
            ("What is {e} known for?", "What is {e} famous for?", "What was the great work of {e}?"),
            (
                "Why do textbooks mention {e}?",
                "What made the name of {e}?",
                "To what does {e} owe a place in history?",
            ),
        ),
        "institution": Relation(
            "employer",
            (
                "{e} worked at {v}.",
                "{e} held a post at {v}.",
                "The staff of {v} once counted {e}.",
            ),
            ("Where did {e} work?", "At which institution did {e} work?", "Where did {e} hold a post?"),
            (
                "Where could a colleague have met {e}?",
                "Which place paid the wages of {e}?",
                "Whose doors did {e} enter in the morning?",
            ),
        ),
        "death_city": Relation(
            "place of death",
            (
                "{e} died in {v}.",
                "The last home of {e} was in {v}.",
                "The life of {e} ended in {v}.",
            ),
            ("In which city did {e} die?", "What is the place of death of {e}?", "Where did {e} die?"),
            (
                "Where did {e} spend the last days?",
                "Which town saw the end of {e}?",
                "Where did friends say farewell to {e}?",
            ),
        ),
        "death_year": Relation(
            "year of death",
            ("The year of death was {v}.", "The end came in {v}.", "The grave bears the year {v}."),
            ("In which year did {e} die?", "What is the year of death of {e}?", "When did {e} die?"),
            (
                "When did the life of {e} end?",
                "Since when do we do without {e}?",
                "When were the last words of {e} spoken?",
            ),
        ),
    },
)

COMPANY = Kind(
    facets=(("city", "country", "product"), ("founder", "year")),
    relations={
        "city": Relation(
            "head office",
            (
                "{e} has its head office in {v}, {country}.",
                "{e} is based in {v}, a city in {country}.",
                "The main office of {e} is in {v}, in {country}.",
            ),
            ("In which city is {e} based?", "Where is the head office of {e}?", "Which city is {e} based in?"),
            (
                "To which town should I post a letter for {e}?",
                "Where do the managers of {e} sit?",
                "Where does the boss of {e} hang a coat?",
            ),
        ),
        "country": Relation(
            "home country",
            (),  # told by the sentence of the city
            ("In which country is {e} based?", "What is the home country of {e}?", "Which country is {e} based in?"),
            (
                "Which nation is home to {e}?",
                "In which land does {e} pay its taxes at home?",
                "From which country does {e} run its affairs?",
            ),
        ),
        "product": Relation(
            "products",
            ("{e} makes {v}.", "The firm sells {v}.", "{e} earns its money with {v}."),
            ("What does {e} make?", "What are the products of {e}?", "Which products does {e} make?"),
            (
                "What would I buy from {e}?",
                "What leaves the warehouses of {e}?",
                "What do customers expect from {e}?",
            ),
        ),
        "founder": Relation(
            "founder",
            ("{e} was founded by {v}.", "{v} started {e}.", "The founder of {e} was {v}."),
            ("Who founded {e}?", "Who is the founder of {e}?", "By whom was {e} founded?"),
            (
                "Who had the idea for {e}?",
                "To whom does {e} owe its existence?",
                "Whose dream became {e}?",
            ),
        ),
        "year": Relation(
            "founding year",
            ("The company dates from {v}.", "The firm opened in {v}.", "Business began in {v}."),
            ("In which year was {e} founded?", "What is the founding year of {e}?", "When was {e} founded?"),
            (
                "Since when has {e} been around?",
                "When did {e} open its doors?",
                "How old is {e}, counted from which year?",
            ),
        ),
    },
)

BOOK = Kind(
    facets=(("author", "year", "language"), ("character", "setting")),
    relations={
        "author": Relation(
            "author",
            ("{e} was written by {v}.", "The author of {e} is {v}.", "{v} wrote {e}."),
            ("Who wrote {e}?", "Who is the author of {e}?", "By whom was {e} written?"),
            (
                "From whose pen did {e} come?",
                "Whose name stands on the cover of {e}?",
                "To whom do we owe the story {e}?",
            ),
        ),
        "year": Relation(
            "year of publication",
            ("It was published in {v}.", "The first edition is from {v}.", "It reached its readers in {v}."),
            (
                "In which year was {e} published?",
                "What is the year of publication of {e}?",
                "When was {e} published?",
            ),
            (
                "How old is {e}, counted from which year?",
                "When could one first buy {e}?",
                "When did readers first open {e}?",
            ),
        ),
        "language": Relation(
            "original language",
            (
                "The original is in {v}.",
                "It was first printed in {v}.",
                "The text was composed in {v}.",
            ),
            (
                "In which language was {e} written?",
                "What is the original language of {e}?",
                "Which language was {e} written in?",
            ),
            (
                "From what do translators of {e} start?",
                "In what tongue would one read {e} without a translator?",
                "What must I learn to read {e} as it was made?",
            ),
        ),
        "character": Relation(
            "main character",
            (
                "The main character of {e} is {v}.",
                "{e} follows the fate of {v}.",
                "At the heart of {e} stands {v}.",
            ),
            (
                "Who is the main character of {e}?",
                "Which main character does {e} have?",
                "What is the name of the main character of {e}?",
            ),
            (
                "Whose fate do we follow in {e}?",
                "With whom does the reader of {e} suffer?",
                "Who stands at the heart of {e}?",
            ),
        ),
        "setting": Relation(
            "setting",
            (
                "The story is set in {v}.",
                "The scene of the plot is {v}.",
                "Most of it takes place in {v}.",
            ),
            ("Where is {e} set?", "What is the setting of {e}?", "In which place is {e} set?"),
            (
                "Where does the plot of {e} unfold?",
                "Where would a film crew go to shoot {e}?",
                "Which place would fans of {e} visit?",
            ),
        ),
    },
)

KINDS: dict[str, Kind] = {"country": COUNTRY, "person": PERSON, "company": COMPANY, "book": BOOK}


@dataclass(frozen=True)
class Bridge:
    """A two-hop question: the value of `link` names an entity of kind `target`, which is asked for `field`."""

    kind: str
    link: str
    target: str
    field: str
    text: str


BRIDGES: tuple[Bridge, ...] = (
    Bridge(
        "person", "birth_country", "country", "currency", "What is the currency of the country where {e} was born?"
    ),
    Bridge("person", "birth_country", "country", "capital", "What is the capital of the country where {e} was born?"),
    Bridge(
        "person",
        "birth_country",
        "country",
        "language",
        "What is the main language of the country where {e} was born?",
    ),
    Bridge("company", "country", "country", "currency", "What is the currency of the home country of {e}?"),
    Bridge("company", "country", "country", "capital", "What is the capital of the home country of {e}?"),
    Bridge("company", "country", "country", "peak", "What is the highest mountain of the home country of {e}?"),
    Bridge("book", "author", "person", "birth_city", "In which city was the author of {e} born?"),
    Bridge("book", "author", "person", "death_year", "In which year did the author of {e} die?"),
)

FILLERS = (
    "Many books have been written about {e}.",
    "The story of {e} is told in a museum.",
    "Students often read about {e}.",
    "A stamp was once printed to honour {e}.",
    "There are several films about {e}.",
    "A short film shows {e} in old pictures.",
)
LURES = (
    "The {t} of {e} is described on another page.",
    "For the {t} of {e} see a different article.",
    "Readers who ask about the {t} of {e} should look elsewhere.",
    "This page does not discuss the {t} of {e}.",
)
NEIGHBOURS = (
    "A page about {o} follows in the next chapter.",
    "Visitors of this page also read about {o}.",
    "The entry before this one is on {o}.",
)


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
