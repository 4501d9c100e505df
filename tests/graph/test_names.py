from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.graph import GraphError
from ragkit.graph import names as names_module
from ragkit.graph.names import Names

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda word: word.strip())


def test_a_sequence_of_strings():
    names = Names(["nan", "null", "None", "NA", "北京", "a,b"], "entity")
    assert len(names) == 6 and names[0] == "nan" and names[-1] == "a,b" and names[np.int64(4)] == "北京"
    assert list(names) == ["nan", "null", "None", "NA", "北京", "a,b"]
    assert names[1:3] == ["null", "None"] and names[::-2] == ["a,b", "NA", "null"]
    assert "null" in names and "Null" not in names and 3 not in names
    assert repr(names) == "Names(6: 'nan', 'null', 'None', ...)"
    with pytest.raises(IndexError, match="entity 6 of 6"):
        names[6]


def test_ids_of_known_and_unknown_names():
    names = Names(["lima", "peru", "chile"], "entity")
    for wanted in (["peru"], ["peru", "x", "peru", "lima", "chile", "y", ""]):  # by either way of looking up
        expected = [["lima", "peru", "chile"].index(w) if w in ("lima", "peru", "chile") else -1 for w in wanted]
        ids = names.ids(wanted)
        assert ids.dtype == np.int32 and ids.tolist() == expected
    assert names.ids([]).tolist() == [] and Names([]).ids(["x"]).tolist() == [-1]


@given(st.lists(WORDS, unique=True, max_size=30), st.lists(WORDS, max_size=30), st.data())
def test_ids_agree_with_a_dict(known, others, data):
    wanted = data.draw(st.permutations(others + known[: len(known) // 2]))
    places = {name: place for place, name in enumerate(known)}
    assert Names(known).ids(wanted).tolist() == [places.get(name, -1) for name in wanted]


def test_iteration_crosses_batches(monkeypatch):
    monkeypatch.setattr(names_module, "BATCH", 4)
    words = [f"w{i}" for i in range(11)]
    assert list(Names(words)) == words


def test_index_names_the_nearest():
    names = Names(["Peru", "Chile", "Ecuador"], "entity")
    assert names.index("Chile") == 1
    with pytest.raises(GraphError, match=r"^no entity 'peru' \(did you mean 'Peru'\?\)$"):
        names.index("peru")
    with pytest.raises(GraphError, match=r"did you mean 'Ecuador'"):
        names.index("Equador")
    with pytest.raises(GraphError, match="^no entity 'qqq'$"):
        names.index("qqq")


def test_nearest_of_many_looks_at_similar_ones_only(monkeypatch):
    monkeypatch.setattr(names_module, "NEAR_CANDIDATES", 10)
    names = Names([f"entity {i}" for i in range(200)] + ["Ecuador"])
    assert names.nearest("Ecuadr") == "Ecuador" and names.nearest("zzzzzzzzzzzz") is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None], "entity 1 is missing"),
        (["a", float("nan")], "entity 1 is missing"),
        (["a", " \u3000"], r"entity 1 is blank \(' \\u3000'\)"),
        (["a", "b", "c", "b", "a"], r"entity 'b' stands there twice \(places 1 and 3\)"),
        (["a", 1.5], r"entity 1: expected text, found float \(1.5\)"),
        (["a", "\ud800"], "entity 1: .* half a surrogate pair"),
        (pa.array([1.5]), "entity: expected text, found Arrow type double"),
    ],
)
def test_names_that_are_none(values, message):
    with pytest.raises(GraphError, match=message):
        Names(values, "entity")


def test_numbers_become_text():
    assert list(Names([7, "x", np.int32(8)])) == ["7", "x", "8"]


def test_the_hash_depends_on_where_names_end():
    def digest(array: pa.Array) -> str:
        state = hashlib.blake2b()
        Names(array).update_hash(state)
        return state.hexdigest()

    assert digest(pa.array(["ab", "c"])) != digest(pa.array(["a", "bc"]))
    assert digest(pa.array(["x", "ab", "c"]).slice(1)) == digest(pa.array(["ab", "c"]))
