"""Question sets: v1's rule for rows, what is reported, the cache, and the shared data sets."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ragkit import small_world
from ragkit.gfm import QuestionError, QuestionSet, embed_relations
from ragkit.gfm.ragged import Ragged
from ragkit.gfm.text_encoder import encoder_identity
from ragkit.graph import KnowledgeGraph
from ragkit.rag.encoder import Encoder


def row(number, question="a cab", entities=("lima",), support=("peru",), documents=("Peru",), **more):
    return {
        "id": f"q{number}",
        "question": question,
        "question_entities": list(entities),
        "supporting_entities": list(support),
        "supporting_facts": list(documents),
        **more,
    }


def test_rows_become_index_lists_that_stay_aligned(world, letters, capsys):
    rows = [
        row(0, "abc", ["lima", "lima", "atlantis"], ["peru", "chile"], ["Peru", "Chile"]),
        row(1, entities=["atlantis"]),
        row(2, support=[]),
        row(3, documents=["Nowhere"]),
        row(4, "  "),
        row(5, "hag", ["santiago"], ["santiago"], ["Santiago", "Nowhere"]),
        row(5, "hag", ["santiago"], ["santiago"], ["Santiago", "Nowhere"]),
    ]
    encoder = letters()
    found = QuestionSet.load(rows, world, encoder, cache=False)
    assert found.ids == ["q0", "q5"] and found.rows == [0, 5] and found.questions == ["abc", "hag"] and len(found) == 2
    batch = found.batch([1, 0])
    assert batch.ids == ["q5", "q0"]
    assert torch.equal(batch.embeddings, encoder.encode(["hag", "abc"], "query"))
    names = list(world.entities)
    ids = [[names.index(name) for name in group] for group in (["santiago"], ["lima"], ["peru", "chile"])]
    assert [t.tolist() for t in batch.question_entities] == [ids[0], ids[1]]
    assert [t.tolist() for t in batch.supporting_entities] == [ids[0], ids[2]]
    assert [t.tolist() for t in batch.supporting_documents] == [[2], [0, 1]]
    assert [b.ids for b in found.batches(1)] == [["q0"], ["q5"]]
    report = found.report
    assert report.rows == 7 and report.num_skipped == 5 and not report.ok
    assert report.reasons == {
        "no question": 1,
        "repeats another row": 1,
        "no question entity in the graph": 1,
        "no supporting entity in the graph": 1,
        "no supporting document in the graph": 1,
    }
    assert report.unlinked == {"question_entities": 2, "supporting_facts": 2}
    assert report.unlinked_examples[0] == (0, "question_entities", "atlantis")
    shown = capsys.readouterr().out
    assert shown.strip() == str(report)
    assert "2 of 7 questions used" in shown and "row 1: no question entity in the graph" in shown


def test_nothing_to_report_prints_nothing(world, letters, capsys):
    found = QuestionSet.load([row(0)], world, letters(), cache=False)
    assert found.report.ok and capsys.readouterr().out == ""


def test_v1_names_and_v2s_field(letters):
    graph = KnowledgeGraph.from_triples([("São Paulo", "in", "Brazil")], {"D": ["São Paulo"]}, v1_names=True)
    rows = [row(0, entities=["São Paulo"], support=["BRAZIL"], documents=["D"])]
    rows[0]["supporting_documents"] = rows[0].pop("supporting_facts")
    assert len(QuestionSet.load(rows, graph, letters(), v1_names=True, cache=False)) == 1
    with pytest.raises(QuestionError, match="no question can be used"):
        QuestionSet.load(rows, graph, letters(), cache=False)


def test_rows_that_are_refused(world, letters, tmp_path):
    def refused(message, rows):
        with pytest.raises(QuestionError, match=re.escape(message)):
            QuestionSet.load(rows, world, letters(), cache=False)

    raw = {key: value for key, value in row(3).items() if key != "question_entities"}
    refused("the list, row 1: no field 'question_entities'", [row(0), raw])
    refused("raw file, stage 1 (entity linking) adds it", [raw])
    refused("the list, row 0, field 'supporting_facts': expected a list of names", [row(0, supporting_facts="Peru")])
    refused("field 'question_entities': expected a list of names, found [3]", [row(0, entities=[3])])
    refused("row 1, field 'question': expected text, found NoneType", [row(0), row(1, None)])
    refused("rows 0 and 1 have the same id 'q7'", [row(7), row(7, "other")])
    refused("row 0: expected an object, found str", ["x"])
    refused("no question can be used", [])
    refused("expected a path or a list of rows, found int", 3)
    refused("nowhere.json: no such file", tmp_path / "nowhere.json")
    (tmp_path / "train.json").write_text("[{]")
    refused("train.json: not valid JSON", tmp_path)
    (tmp_path / "train.json").write_text('{"a": 1}')
    refused("expected a JSON list of rows, found dict", tmp_path)
    (tmp_path / "train.json").write_bytes(b'["\xff"]')
    refused("not UTF-8", tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row(0)) + "\n\n{]\n")
    refused("rows.jsonl, line 3: not valid JSON", tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row(0)) + "\n\n" + json.dumps(row(1, None)))
    refused("rows.jsonl, line 3, field 'question': expected text", tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("\n" + json.dumps(row(1, entities=["Atlantis"])))
    refused("line 2: no question entity in the graph", tmp_path / "rows.jsonl")
    with pytest.raises(QuestionError, match="the splits there are: train"):
        QuestionSet.load(tmp_path, world, letters(), "test", cache=False)


def test_json_lines_and_a_byte_order_mark(world, letters, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + "".join(json.dumps(row(i, "\u2028 a")) + "\n" for i in range(3)), encoding="utf-8")
    assert len(QuestionSet.load(path, world, letters(), cache=False)) == 3


def test_an_encoder_that_gives_nan_is_refused(world, letters):
    with pytest.raises(ValueError, match="NaN or infinity for 1 texts .first: 'a cab'"):
        QuestionSet.load([row(0)], world, letters(float("nan")), cache=False)


# ---- the cache ----


def test_the_cache_is_keyed_by_content_and_made_anew_when_it_is_broken(world, letters, tmp_path):
    path, cache = tmp_path / "train.json", tmp_path / "cache"
    path.write_text(json.dumps([row(0), row(1, entities=["atlantis"])]))

    def load(graph=world, scale=1.0):
        encoder = letters(scale)
        identity = encoder_identity(encoder)
        before = encoder.calls
        found = QuestionSet.load(path, graph, encoder, cache=cache)
        assert identity and torch.equal(found.embeddings, encoder.encode(found.questions, "query"))
        return found, encoder.calls - before - 3  # two for the identity, one here

    first, made = load()
    assert made == 1
    again, made = load()
    assert made == 0
    assert vars(again.report) == vars(first.report)
    assert (again.ids, again.rows, again.questions) == (first.ids, first.rows, first.questions)
    assert torch.equal(again.supporting_entities.ids, first.supporting_entities.ids)
    assert load(scale=2.0)[1] == 1  # another encoder
    other = KnowledgeGraph.from_triples([("lima", "x", "peru")], {"Peru": ["peru"]})
    assert load(graph=other)[1] == 1
    path.write_text(json.dumps([row(0, "changed")]))
    assert load()[1] == 1
    assert load()[1] == 0
    assert len(list(cache.iterdir())) == 4
    for broken in cache.glob("*/tensors.safetensors"):
        broken.write_bytes(broken.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="tensors.safetensors is cut short or altered"):
        assert load()[1] == 1
    assert load()[1] == 0
    for broken in cache.glob("*/meta.json"):
        broken.write_text("{")
    with pytest.warns(UserWarning, match="cannot be used"):
        assert load()[1] == 1


def test_the_users_cache_folder(world, letters, tmp_path, monkeypatch):
    monkeypatch.setenv("RAGKIT_CACHE", str(tmp_path / "home"))
    QuestionSet.load([row(0)], world, letters())
    assert [path.name.split("-")[0] for path in (tmp_path / "home" / "gfm").iterdir()] == ["questions"]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAGKIT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be written"):
        QuestionSet.load([row(0)], world, letters())


def test_relation_embeddings(world, letters, tmp_path):
    encoder = letters()
    found = embed_relations(world, encoder, cache=tmp_path)
    assert world.rel_emb is found
    assert torch.equal(found, encoder.encode(world.relation_texts, "passage"))
    calls = encoder.calls
    world.rel_emb = None
    assert torch.equal(embed_relations(world, encoder, cache=tmp_path), found)
    assert encoder.calls == calls + 2  # the identity alone
    with torch.inference_mode():
        assert not embed_relations(world, letters(3.0), cache=False).is_inference()


def test_two_real_encoders_are_told_apart(minilm):
    same = Encoder(minilm)
    assert encoder_identity(same) == encoder_identity(minilm)
    other = Encoder(copy.deepcopy(minilm.model))
    assert encoder_identity(other) == encoder_identity(minilm)
    other.model.max_seq_length = 17
    assert encoder_identity(other) != encoder_identity(minilm)
    other = Encoder(copy.deepcopy(minilm.model))
    with torch.no_grad():
        next(other.model.parameters()).add_(1e-3)
    assert encoder_identity(other) != encoder_identity(minilm)


# ---- real data ----


def shared(name):
    path = Path(os.environ.get("RAGKIT_SHARED", Path(__file__).resolve().parents[2].parent / "shared")) / "data" / name
    if not path.is_dir():
        pytest.skip(f"no data/{name} in RAGKIT_SHARED or ../shared")
    return path


@pytest.mark.parametrize("name", ["musique_mini", "hotpot_mini", "wiki2_mini", "small_world"])
def test_v1s_rule_on_real_questions(name, letters):
    path = small_world.path() if name == "small_world" else shared(name)
    graph = KnowledgeGraph.load(path)
    found = QuestionSet.load(name if name == "small_world" else path, graph, letters(), "test", cache=False)
    rows = json.loads((path / "processed" / "stage1" / "test.json").read_text(encoding="utf-8"))
    entities, documents = set(graph.entities), set(graph.documents)
    used = [
        number
        for number, item in enumerate(rows)
        if entities & set(item["question_entities"])
        and entities & set(item["supporting_entities"])
        and documents & set(item["supporting_facts"])
    ]
    assert found.rows == used and len(used) > 10
    assert found.ids == [str(rows[number]["id"]) for number in used]
    place = len(used) // 2
    names = [graph.entities[int(i)] for i in found.question_entities[place]]
    assert names == [n for n in dict.fromkeys(rows[used[place]]["question_entities"]) if n in entities]
    titles = {graph.documents[int(i)] for i in found.supporting_documents[place]}
    assert titles == documents & set(rows[used[place]]["supporting_facts"])


def test_ragged():
    lists = Ragged.of([[3, 1], [], [2]])
    assert [lists[i].tolist() for i in range(len(lists))] == [[3, 1], [], [2]]
    assert lists[-1].tolist() == [2] and [t.tolist() for t in lists.at([2, 0])] == [[2], [3, 1]]
    with pytest.raises(IndexError):
        lists[3]
    assert len(Ragged.of([])) == 0


def test_importing_the_model_is_cheap():
    code = (
        "import sys, ragkit.gfm; print([m for m in ('transformers', 'sentence_transformers', 'torch_geometric', "
        "'triton', 'huggingface_hub', 'numba') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
