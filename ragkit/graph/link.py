"""Entity linking: which entities of a graph a question names, by their words and, if asked, by nearness of meaning."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ragkit.graph.knowledge_graph import KnowledgeGraph
from ragkit.graph.names import BATCH
from ragkit.graph.normalise import normalise, v1_name

# Words that shape a question or a sentence, and name nothing. An entity of these words alone is never linked.
STOP_WORDS = frozenset(
    """a about after all also am an and any are as at be been before being between both but by can could did do does
    during each either else ever few first for from had has have he her hers him his how i if in into is it its itself
    last ll many may me more most much must my near no nor not of off on once one only or other our out over own per
    please re s same shall she should so some such t tell than that the their theirs them then there these they this
    those through to too two under until up upon us ve very was we were what whatever when where whether which while
    who whom whose why will with within without would yes you your yours d m""".split()
)
# ASCII characters that `normalise` turns into spaces: punctuation, separators and control characters.
_ASCII_GAPS = r"[\x00-\x20!\"#%&'()*,\-./:;?@\[\\\]_{}\x7f]+"
# (texts, k) -> similarity [B, k] and entity ids [B, k], best first, of the entities whose names are nearest
Nearest = Callable[[Sequence[str], int], tuple[Any, Any]]


@dataclass(frozen=True)
class LinkedEntity:
    """An entity that a question names.

    Attributes:
        id: Its id in the graph.
        name: Its name there.
        span: The words of the question that were linked to it (all of them for "fallback").
        how: "string": the span is the name, in normal form. "embedding": of all names, this one is nearest in meaning
            to the span. "fallback": nothing was linked, and this name is near to the whole question. "fact": a fact
            of the entity is near to the question (`ragkit.gfm.FactLinker`).
        score: 1 for "string", else the cosine.
    """

    id: int
    name: str
    span: str
    how: Literal["string", "embedding", "fallback", "fact"]
    score: float


class Word(NamedTuple):
    """One word of a question: its normal form, and how it is written."""

    form: str
    surface: str

    @property
    def capital(self) -> bool:
        """Whether it has a capital letter."""
        return any(letter.isupper() for letter in self.surface)

    @property
    def marked(self) -> bool:
        """Whether it looks like a name: a capital letter, or a number as large as a year."""
        return self.capital or (self.form.isdigit() and len(self.form) >= 4)

    def is_stop(self, stop_words: frozenset[str]) -> bool:
        """Whether it is a stop word; "US" and "IT" are none."""
        return self.form in stop_words and not (len(self.surface) > 1 and self.surface.isupper())


def normal_forms(names: pa.Array) -> pa.Array:
    """`normalise` of many names at once: [N] large strings. ASCII names, mostly all, do not become Python objects."""
    plain = pc.string_is_ascii(names)
    forms = pc.replace_substring_regex(pc.ascii_lower(names), _ASCII_GAPS, " ")
    forms = pc.utf8_trim(forms, " ")
    if pc.all(plain).as_py() in (True, None):
        return forms
    others = pa.array([normalise(name) for name in names.filter(pc.invert(plain)).to_pylist()], pa.large_string())
    return pc.replace_with_mask(forms, pc.invert(plain), others)


def split_words(text: str) -> list[Word]:
    """The words of a text; their forms joined by spaces are `normalise(text)`."""
    words = []
    for chunk in re.findall(r"\S+", text):
        pieces = [piece for piece in re.split(r"[^\w+<=>^`|~$]|_", chunk) if piece]
        forms = normalise(chunk).split()
        if len(pieces) != len(forms):  # letters that fold to more or fewer words: all get the chunk's look
            pieces = [chunk] * len(forms)
        words += [Word(form, piece) for form, piece in zip(forms, pieces, strict=True)]
    return words


def open_spans(words: list[Word], free: np.ndarray, stop_words: frozenset[str]) -> Iterator[tuple[int, int]]:
    """(start, end) of the runs of free words that look like names.

    In a question with capitals (past its first word) a run starts and ends with a capitalised word that is no stop
    word; stop words in lower case may stand between ("King of the Sierras"). In one without, a run is of free words
    that are no stop words.
    """
    cased = has_capitals(words)
    start: int | None = None
    last = 0
    for place, word in enumerate(words):
        stop = word.is_stop(stop_words)
        if free[place] and not stop and (word.capital or not cased) and not too_short(word.form):
            start, last = place if start is None else start, place + 1
        elif not (cased and free[place] and stop) and start is not None:
            yield start, last
            start = None
    if start is not None:
        yield start, last


def has_capitals(words: Sequence[Word]) -> bool:
    """Whether any word but the first, which often has one for being first, has a capital letter."""
    return any(word.capital for word in words[1:])


def too_short(form: str) -> bool:
    """A single letter, or a number too small for a year."""
    return (len(form) < 2 and form.isascii()) or (form.isdigit() and len(form) < 4)


def surface(words: Sequence[Word]) -> str:
    """The words as they are written."""
    return " ".join(word.surface for word in words)


def _hashes(forms: pa.Array) -> np.ndarray:
    """[N] int64, Python's hash of each string; strings are made in blocks and not kept."""
    keys = np.empty(len(forms), np.int64)
    for start in range(0, len(forms), BATCH):
        block = forms.slice(start, BATCH).to_pylist()
        keys[start : start + len(block)] = np.fromiter(map(hash, block), np.int64, len(block))
    return keys


class EntityLinker:
    """Finds the entities that questions name.

    1. String: names as whole-word n-grams of the question, both in the form of `ragkit.graph.normalise`; the longest
       first (of equal ones the leftmost), none over another. Entities whose names have one form are all linked.
    2. Embedding (with `nearest`): what is left of the capitalised spans (in a question without capitals: of the runs
       of words that are no stop words) goes to the nearest entity name, if its cosine reaches `threshold`.
    3. Single words in lower case ("president"), by string; in a question with capitals only if it has no link yet,
       since there they seldom are what it asks about.
    4. Fallback (with `nearest`): a question without any link gets the `fallback` names nearest to all of it.

    Never linked by string are stop words, single letters and numbers of less than four digits; and, where no word of
    the span has a capital or is a year, names that start or end with a stop word and names in more than `common` of
    the documents ("film"). The string step needs words between spaces; names in scripts without them are left to the
    other two.

    Args:
        graph: Its entities are linked to.
        nearest: (texts, k) -> (cosines [B, k], ids [B, k]), such as `ragkit.gfm.EntitySearch`; None: strings only.
        threshold: Least cosine of an embedding link.
        fallback: Entities for a question that has no link else; 0: none.
        common: Share of the documents from which on a name in lower case is too common (5 documents always pass).
        stop_words: In normal form.

    Example:
        >>> graph = KnowledgeGraph.from_triples([("lima", "capital of", "peru")])
        >>> [entity.name for entity in EntityLinker(graph).link(["Is Lima in Peru?"])[0]]
        ['lima', 'peru']
    """

    def __init__(
        self,
        graph: KnowledgeGraph,
        nearest: Nearest | None = None,
        threshold: float = 0.8,
        fallback: int = 1,
        common: float = 0.01,
        stop_words: frozenset[str] = STOP_WORDS,
    ) -> None:
        for name, value, what in (("threshold", threshold, "a cosine"), ("common", common, "a share")):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected {what} from 0 to 1, found {value}")
        if fallback < 0:
            raise ValueError(f"fallback: expected a number of entities from 0, found {fallback}")
        self.graph, self.nearest = graph, nearest
        self.threshold, self.fallback, self.common, self.stop_words = threshold, fallback, common, stop_words

    @cached_property
    def _index(self) -> NameIndex:
        return NameIndex(self.graph.entities.array)

    @cached_property
    def _most_documents(self) -> int:
        return max(5, int(self.common * self.graph.num_documents))

    def link(self, questions: Sequence[str]) -> list[list[LinkedEntity]]:
        """The entities of each question, each once, in the order of their spans; empty where nothing fits.

        Args:
            questions: B texts.
        """
        if isinstance(questions, str):
            raise TypeError("link takes a list of questions; found one string")
        rows = [_Question(question, split_words(question)) for question in questions]
        self._by_string(rows)
        if self.nearest is not None:
            self._by_embedding(rows, self.nearest)
        for row in rows:
            if not (row.links and row.cased):
                row.links += row.weak
        if self.nearest is not None and self.fallback:
            self._by_fallback([row for row in rows if not row.links and row.text.strip()], self.nearest)
        return [row.linked() for row in rows]

    def _by_string(self, rows: list[_Question]) -> None:
        grams = [list(self._grams(row.words)) for row in rows]
        ids = iter(self._index.find([text for row in grams for _, _, text in row]))
        for row, spans in zip(rows, grams, strict=True):
            for start, end, _ in spans:  # the longest first
                entities = next(ids)
                if not entities or not row.free[start:end].all():
                    continue
                marked = any(word.marked for word in row.words[start:end])
                if not marked and self.graph.document_frequency[entities].max() > self._most_documents:
                    continue
                links = row.links if marked or end - start > 1 else row.weak
                span = surface(row.words[start:end])
                links += [(start, LinkedEntity(e, self.graph.entities[e], span, "string", 1.0)) for e in entities]
                row.free[start:end] = False

    def _grams(self, words: list[Word]) -> Iterator[tuple[int, int, str]]:
        """(start, end, normal form) of the n-grams that may be names, the longest first."""
        for size in range(min(len(words), self._index.longest), 0, -1):
            for start in range(len(words) - size + 1):
                part = words[start : start + size]
                if self._may_be_name(part):
                    text = " ".join(word.form for word in part)
                    yield start, start + size, text
                    if not text.isascii():  # the graph may be in GFM-RAG v1's form, which drops such letters
                        yield start, start + size, " ".join(v1_name(surface(part)).split())

    def _may_be_name(self, part: list[Word]) -> bool:
        stop = [word.is_stop(self.stop_words) for word in part]
        if all(stop) or (len(part) == 1 and too_short(part[0].form)):
            return False
        return any(word.marked for word in part) or not (stop[0] or stop[-1])

    def _by_embedding(self, rows: list[_Question], nearest: Nearest) -> None:
        spans = [
            (row, start, surface(row.words[start:end]))
            for row in rows
            for start, end in open_spans(row.words, row.free, self.stop_words)
        ]
        if spans:
            cosines, ids = nearest([text for _, _, text in spans], 1)
            for (row, start, text), cosine, entity in zip(spans, cosines[:, 0], ids[:, 0], strict=True):
                if cosine >= self.threshold:
                    row.links.append((start, self._near(entity, text, "embedding", cosine)))

    def _by_fallback(self, rows: list[_Question], nearest: Nearest) -> None:
        if rows:
            cosines, ids = nearest([row.text for row in rows], self.fallback)
            for row, near, entities in zip(rows, cosines, ids, strict=True):
                row.links += [(0, self._near(e, row.text, "fallback", c)) for c, e in zip(near, entities, strict=True)]

    def _near(self, entity: Any, span: str, how: Literal["embedding", "fallback"], cosine: Any) -> LinkedEntity:
        return LinkedEntity(int(entity), self.graph.entities[int(entity)], span, how, float(cosine))


class _Question:
    """A question while it is linked: its words, which of them are free, and (first word, entity) of its links."""

    def __init__(self, text: str, words: list[Word]) -> None:
        self.text, self.words = text, words
        self.free = np.ones(len(words), bool)
        self.links: list[tuple[int, LinkedEntity]] = []
        self.weak: list[tuple[int, LinkedEntity]] = []  # single words in lower case

    @property
    def cased(self) -> bool:
        """Whether capitals tell names: there is one past the first word."""
        return has_capitals(self.words)

    def linked(self) -> list[LinkedEntity]:
        """In the order of the spans, each entity once."""
        found: dict[int, LinkedEntity] = {}
        for _, link in sorted(self.links, key=lambda pair: pair[0]):
            found.setdefault(link.id, link)
        return list(found.values())


class NameIndex:
    """Names in normal form -> ids, in two arrays of 8 bytes a name beside the names themselves.

    Args:
        names: [N] Arrow strings.

    Attributes:
        longest: Words in the longest name.
    """

    def __init__(self, names: pa.Array) -> None:
        self._forms = normal_forms(names)
        keys = _hashes(self._forms)
        self._order = np.argsort(keys, kind="stable")  # [N] ids; equal keys in the order of ids
        self._keys = keys[self._order]
        spaces = pc.max(pc.count_substring(self._forms, " ")).as_py()
        self.longest = 0 if spaces is None else int(spaces) + 1

    def find(self, texts: Sequence[str]) -> list[list[int]]:
        """For each text (in normal form) the ids of the names that have this form."""
        if not len(texts):
            return []
        wanted = np.fromiter(map(hash, texts), np.int64, len(texts))
        first, end = np.searchsorted(self._keys, wanted, "left"), np.searchsorted(self._keys, wanted, "right")
        found: list[list[int]] = [[] for _ in texts]
        for place in np.flatnonzero(end > first).tolist():
            ids = self._order[first[place] : end[place]].tolist()
            found[place] = [i for i in ids if self._forms[i].as_py() == texts[place]]  # a hash may have two texts
        return found
