"""The data sets of a run: found by name, read, and parted so that no document stands on both sides."""

from __future__ import annotations

import json
from pathlib import Path

import finetune_job as job
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ragkit.config import GFMFinetuneConfig
from ragkit.gfm import QuestionError, QuestionReport, QuestionSet
from ragkit.gfm.datasets import (
    DatasetError,
    find_dataset,
    has_split,
    hold_out_questions,
    load_finetune_data,
    load_graphs,
    short_names,
)
from ragkit.gfm.ragged import Ragged
from ragkit.gfm_config import GFMDatasets
from ragkit.graph import GraphError
from ragkit.sampling import draw


@pytest.fixture
def root(tmp_path):
    return job.write_two(tmp_path)


def load(root, seed=0, tests=True, encoder=None, **changes):
    datasets = GFMDatasets(**{"root": str(root), "train_names": ["left"], "cache": False, **changes})
    return load_finetune_data(datasets, encoder or job.WordEncoder(), seed, tests)


def rewrite(root, name, split, change):
    """Changes the rows of a split in place."""
    path = Path(root) / name / "processed" / "stage1" / f"{split}.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


# ---- what is held out ----


def questions_with(documents, parts=()):
    """A question set of which nothing but documents and parts is set."""
    count = len(documents)
    nothing = Ragged.of([[0]] * count)
    is_part = torch.zeros(count, dtype=torch.bool)
    is_part[list(parts)] = True
    ids = [f"q{i}" for i in range(count)]
    return QuestionSet(
        ids, list(range(count)), ids, torch.zeros(count, 2), nothing, nothing, Ragged.of(documents), is_part,
        QuestionReport("test"),
    )  # fmt: skip


@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3, unique=True), min_size=1, max_size=40),
    st.sets(st.integers(0, 39)),
    st.floats(0.01, 0.5),
    st.integers(0, 5),
)
def test_no_document_on_both_sides(documents, parts, share, seed):
    questions = questions_with(documents, {place for place in parts if place < len(documents)})
    kept, held = hold_out_questions(questions, share, seed)
    sides = [{d for place in side for d in documents[place]} for side in (kept, held)]
    assert kept and not sides[0] & sides[1] and not set(kept) & set(held)
    assert kept == sorted(set(kept)) and held == sorted(set(held))
    assert not any(questions.is_part[place] for place in held)  # never scored
    left_out = set(range(len(documents))) - set(kept) - set(held)
    assert all(questions.is_part[place] for place in left_out)  # parts of what is held out, and nothing else
    assert all(sides[0].isdisjoint(documents[place]) for place in left_out)
    assert hold_out_questions(questions, share, seed) == (kept, held)


def test_the_share_is_reached_where_groups_are_small():
    questions = questions_with([[i // 2] for i in range(200)], parts=range(0, 20, 2))
    for seed in range(5):
        kept, held = hold_out_questions(questions, 0.1, seed)
        assert 19 <= len(held) <= 20 and len(kept) + len(held) >= 190  # 10 % of the 190 whole ones, two to a group
    assert len({tuple(hold_out_questions(questions, 0.1, seed)[1]) for seed in range(5)}) == 5


def test_large_groups():
    two = questions_with([[0], [0], [0], [1], [1], [0, 2], [2]])
    assert hold_out_questions(two, 0.1, 0) == ([0, 1, 2, 5, 6], [3, 4])  # too large, but the smaller of the two
    giant = questions_with([[0]] * 20 + [[1], [2]])
    for seed in range(5):
        assert len(hold_out_questions(giant, 0.1, seed)[1]) == 2  # 20 questions on one document are trained on
    assert hold_out_questions(questions_with([[0], [0, 1], [1]]), 0.5, 0) == ([0, 1, 2], [])
    assert hold_out_questions(questions_with([[0]]), 0.5, 0) == ([0], [])
    only_parts = questions_with([[0], [1], [2]], parts=[0, 1, 2])
    assert hold_out_questions(only_parts, 0.5, 0) == ([0, 1, 2], [])


# ---- loading ----


def test_a_run_has_training_validation_and_test_questions(root):
    data = load(root, train_names=["left", "right"], valid_share=0.2)
    assert list(data.train) == list(data.valid) == list(data.test) == ["left", "right"]
    for name, train in data.train.items():
        valid, test = data.valid[name], data.test[name]
        assert train.graph is valid.graph is test.graph and train.graph.rel_emb.shape == (6, 5)
        assert not set(train.questions.ids) & set(valid.questions.ids)
        assert len(train.questions) + len(valid.questions) == {"left": 22, "right": 13}[name]
        assert len(test.questions) == {"left": 9, "right": 6}[name]
    again, other = load(root, train_names=["left", "right"]), load(root, seed=1)
    assert again.valid["left"].questions.ids == load(root).valid["left"].questions.ids
    assert again.valid["left"].questions.ids != other.valid["left"].questions.ids


def test_named_validation_sets_are_taken_whole(root):
    data = load(root, valid_names=["right"], valid_split="train", test_names=[])
    assert len(data.train["left"].questions) == 22 and list(data.valid) == ["right"] and data.test == {}
    assert len(data.valid["right"].questions) == 13
    same = load(root, valid_names=["left"])
    assert same.valid["left"].graph is same.train["left"].graph  # one graph in memory, however often it is named
    assert load(root, valid_share=0).valid == {} and load(root, tests=False).test == {}


def test_test_questions_that_train_or_choose_the_model_are_told(root, capsys):
    load(root, train_names=["left", "right"])
    load(root, valid_names=["right"], test_names=["left"])
    assert "are not those of a test" not in capsys.readouterr().out
    load(root, valid_names=["left"])
    assert "left: 9 of 9 test questions are also used to choose the best model" in capsys.readouterr().out
    load(root, valid_share=0, test_split="train")
    assert "left: 22 of 22 test questions are also used to train" in capsys.readouterr().out


def test_parts_of_questions_are_trained_on_but_not_scored(root):
    for split in ("train", "test"):
        rewrite(root, "left", split, lambda rows: [{**row, "sub_question": i % 3 == 0} for i, row in enumerate(rows)])
    data = load(root, valid_share=0.3)
    assert data.train["left"].questions.is_part.any()
    assert not data.valid["left"].questions.is_part.any() and not data.test["left"].questions.is_part.any()
    assert data.test["left"].questions.ids == [i for n, i in enumerate(load_ids(root, "left", "test")) if n % 3]
    rewrite(root, "left", "test", lambda rows: [{**row, "sub_question": True} for row in rows])
    with pytest.raises(DatasetError, match="left: all 9 questions of test are marked sub_question"):
        load(root)


def load_ids(root, name, split):
    return [row["id"] for row in json.loads((Path(root) / name / "processed/stage1" / f"{split}.json").read_text())]


def test_limits_take_a_sample_that_is_the_same_whatever_the_seed(root):
    ids = {split: load_ids(root, "left", split) for split in ("train", "test")}
    for seed in (0, 1):
        data = load(root, seed=seed, max_train=5, max_test=2, valid_share=0)
        train, test = data.train["left"].questions.ids, data.test["left"].questions.ids
        assert train == [ids["train"][place] for place in draw(len(ids["train"]), 5)] != ids["train"][:5]
        assert test == [ids["test"][place] for place in draw(len(ids["test"]), 2)]


def test_when_nothing_can_be_held_out_it_says_so(root, capsys):
    rewrite(root, "left", "train", lambda rows: [{**row, "supporting_facts": ["about p1x0"]} for row in rows])
    assert load(root).valid == {}
    assert "left: no question is held out" in capsys.readouterr().out


# ---- names ----


def test_a_data_set_is_found_by_name_or_folder(root, monkeypatch):
    assert find_dataset("left", root) == str(root / "left") == find_dataset(str(root / "left"), "/nowhere")
    assert find_dataset("small_world", "/nowhere") == "small_world"
    monkeypatch.chdir(root)
    assert find_dataset("left", "/nowhere") == "left"


def test_a_missing_data_set_names_the_nearest(root):
    with pytest.raises(DatasetError, match='no data set "lefft": .* holds no such folder; did you mean "left"?'):
        load(root, train_names=["lefft"])
    with pytest.raises(DatasetError, match="holds no such folder; there are left, right"):
        find_dataset("zzz", root)
    with pytest.raises(DatasetError, match=r"datasets.root=.*nowhere is no folder"):
        load(root / "nowhere")


def test_short_names():
    assert short_names(["a/x", "b/y/", "z"]) == ["x", "y", "z"]
    assert short_names(["a/x", "b/x", "y"]) == ["a/x", "b/x", "y"]
    with pytest.raises(DatasetError, match='the data set "x" is named twice'):
        short_names(["x", "y", "x"])


def test_the_same_data_set_twice_and_two_that_end_alike(root, tmp_path):
    with pytest.raises(DatasetError, match='the data set "left" is named twice'):
        load(root, train_names=["left", "left"])
    with pytest.raises(DatasetError, match='"left" and ".*left" are the same data set'):
        load(root, train_names=["left", str(root / "left")])
    other = job.write_dataset(tmp_path / "more" / "left", people=8, seed=4, train=9, test=3)
    names = ["left", str(other)]
    data = load(root, train_names=names, valid_share=0)
    assert list(data.train) == names and [len(part.questions) for part in data.train.values()] == [22, 9]
    assert list(load_graphs(names, GFMDatasets(root=str(root), cache=False), job.WordEncoder())) == names


# ---- what is missing or cannot be used ----


def test_a_data_set_without_the_split_lists_those_it_has(root):
    folder = root / "left" / "processed" / "stage1"
    (folder / "train.json").rename(folder / "dev.json")
    with pytest.raises(QuestionError, match="train.json: no such file; the splits there are: dev, test"):
        load(root)
    assert len(load(root, train_split="dev", valid_share=0).train["left"].questions) == 22
    (folder / "test.json").unlink()
    assert load(root, train_split="dev").test == {}  # nothing to score before and after
    datasets = GFMDatasets(root=str(root))
    assert not has_split("left", datasets) and has_split("right", datasets) and has_split("small_world", datasets)
    with pytest.raises(QuestionError, match="test.json: no such file"):
        load(root, train_split="dev", test_names=["left"])  # asked for by name


def test_a_folder_without_a_graph(root):
    (root / "left" / "processed" / "stage1" / "kg.txt").unlink()
    with pytest.raises(GraphError, match="holds no graph"):
        load(root)


def test_documents_that_the_corpus_does_not_have_are_counted(root, capsys):
    def lose(rows):
        return [{**row, "supporting_facts": ["lost"]} if i < 5 else row for i, row in enumerate(rows)]

    rewrite(root, "left", "train", lose)
    data = load(root, valid_share=0)
    assert len(data.train["left"].questions) == 17
    shown = capsys.readouterr().out
    assert "17 of 22 questions used" in shown and "5 skipped: no supporting document in the graph" in shown
    assert "row 0, supporting_facts: 'lost'" in shown
    rewrite(root, "left", "train", lambda rows: [{**row, "supporting_facts": ["lost"]} for row in rows])
    with pytest.raises(QuestionError, match="no question can be used.*0 of 22 questions used"):
        load(root)


@pytest.mark.parametrize("rows", [[], [job.row("q", "nobody", "likes", "p1x0")]])
def test_no_usable_question(root, rows):
    rewrite(root, "left", "train", lambda _: rows)
    with pytest.raises(QuestionError, match="left.*no question can be used|no question can be used.*left"):
        load(root)


def test_settings_are_those_of_the_command(root):
    config = GFMFinetuneConfig(datasets={"root": str(root), "train_names": ["right"], "cache": False})
    assert list(load_finetune_data(config.datasets, job.WordEncoder(), config.seed).train) == ["right"]
