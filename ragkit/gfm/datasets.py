"""The data sets of a GFM run: which folders they are, their graphs and questions, and what is held out of them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragkit.gfm.linking import make_linker, relinked
from ragkit.gfm.questions import QuestionSet
from ragkit.gfm.text_encoder import embed_relations
from ragkit.gfm_config import GFMDatasets
from ragkit.graph import KnowledgeGraph
from ragkit.holding_out import hold_out
from ragkit.notes import note
from ragkit.sampling import draw

SMALL_WORLD = "small_world"


class DatasetError(ValueError):
    """A data set that is not there, or that has nothing to train on."""


@dataclass(frozen=True, eq=False)
class GraphQuestions:
    """Questions over one graph.

    Attributes:
        name: The data set's name.
        graph: With `rel_emb` set.
        questions: The questions.
    """

    name: str
    graph: KnowledgeGraph
    questions: QuestionSet


@dataclass(frozen=True, eq=False)
class FinetuneData:
    """What fine-tuning works on, by the names of the data sets.

    Attributes:
        train: Questions that are learnt from.
        valid: Questions that choose the best model; empty: none.
        test: Questions that are scored before and after; empty: none.
    """

    train: dict[str, GraphQuestions]
    valid: dict[str, GraphQuestions]
    test: dict[str, GraphQuestions]


def find_dataset(name: str, root: str | Path) -> str:
    """The folder that a name stands for: itself, or `root`/name; "small_world" is the shipped one.

    Raises:
        DatasetError: There is none; the message names the nearest.
    """
    if name == SMALL_WORLD:
        return name
    for path in (Path(name).expanduser(), Path(root).expanduser() / name):
        if path.is_dir():
            return str(path)
    folder = Path(root).expanduser()
    there = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    near = difflib.get_close_matches(name, there, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else (f"; there are {', '.join(there[:8])}" if there else "")
    where = f"{folder} holds no such folder" if folder.is_dir() else f"datasets.root={folder} is no folder"
    raise DatasetError(f'there is no data set "{name}": {where}{hint}')


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each data set's path, or the whole path where two end alike.

    Raises:
        DatasetError: One stands there twice.
    """
    twice = [name for name in names if list(names).count(name) > 1]
    if twice:
        raise DatasetError(f'the data set "{twice[0]}" is named twice')
    last = [Path(name).name or name for name in names]
    return [short if last.count(short) == 1 else name for short, name in zip(last, names, strict=True)]


def find_datasets(names: Sequence[str], root: str | Path) -> dict[str, str]:
    """The folder of each data set, by short name.

    Raises:
        DatasetError: There is none, or one stands there twice.
    """
    found = {short: find_dataset(name, root) for short, name in zip(short_names(names), names, strict=True)}
    first: dict[Path, str] = {}
    for short, folder in found.items():
        other = first.setdefault(Path(folder).resolve(), short)
        if other != short:
            raise DatasetError(f'"{other}" and "{short}" are the same data set, {folder}')
    return found


def load_graphs(names: Sequence[str], datasets: GFMDatasets, encoder: Any) -> dict[str, KnowledgeGraph]:
    """The graphs of data sets, by short name, with their relation embeddings.

    Args:
        names: Names or folders.
        datasets: Root and cache.
        encoder: A `TextEncoder`.
    """
    graphs = {}
    for short, folder in find_datasets(names, datasets.root).items():
        graph = KnowledgeGraph.load(folder, v1_names=datasets.v1_names, cache=datasets.cache)
        embed_relations(graph, encoder, cache=datasets.cache)
        graphs[short] = graph
    return graphs


def load_finetune_data(datasets: GFMDatasets, encoder: Any, seed: int, tests: bool = True) -> FinetuneData:
    """Reads graphs and questions of a fine-tuning.

    Args:
        datasets: The settings.
        encoder: A `TextEncoder`.
        seed: Seed of what is held out where `valid_names` is empty.
        tests: Whether the test questions are read too.

    Raises:
        DatasetError: A data set is not there, or nothing is left of it to train on.
        QuestionError: It has no file of the split, or no usable question in it; the message says why.
        GraphError: It has no graph.
    """
    graphs: dict[str, KnowledgeGraph] = {}  # by folder: one object, however often it is named
    linkers: dict[str, Any] = {}

    def questions(names: Sequence[str], split: str, most: int | None, whole: bool) -> dict[str, GraphQuestions]:
        found = {}
        for short, folder in find_datasets(names, datasets.root).items():
            if folder not in graphs:
                graphs[folder] = load_graphs([folder], datasets, encoder).popitem()[1]
            graph = graphs[folder]
            loaded = QuestionSet.load(folder, graph, encoder, split, v1_names=datasets.v1_names, cache=datasets.cache)
            places = [i for i in range(len(loaded)) if not (whole and loaded.is_part[i])]
            if not places:
                raise DatasetError(f"{short}: all {len(loaded)} questions of {split} are marked sub_question")
            used = loaded.subset([places[i] for i in draw(len(places), most)])
            if datasets.link != "given":
                if folder not in linkers:
                    linkers[folder] = make_linker(datasets.link, graph, encoder, datasets.top_facts, datasets.cache)
                used = relinked(used, linkers[folder])
            found[short] = GraphQuestions(short, graph, used)
        return found

    whole = not datasets.sub_questions
    train = questions(datasets.train_names, datasets.train_split, datasets.max_train, whole)
    valid: dict[str, GraphQuestions] = {}
    if datasets.valid_names:
        valid = questions(datasets.valid_names, datasets.valid_split, None, whole=True)
    elif datasets.valid_share:
        for name, part in list(train.items()):
            kept, held_out = hold_out_questions(part.questions, datasets.valid_share, seed)
            train[name] = GraphQuestions(name, part.graph, part.questions.subset(kept))
            if not held_out:
                note(
                    f"{name}: no question is held out to choose the best model, since all share supporting documents "
                    "or are parts of others; datasets.valid_names can name other questions"
                )
            else:
                valid[name] = GraphQuestions(name, part.graph, part.questions.subset(held_out))
    test: dict[str, GraphQuestions] = {}
    if tests:
        names = datasets.test_names
        if names is None:
            names = [name for name in datasets.train_names if has_split(name, datasets)]
        test = questions(names, datasets.test_split, datasets.max_test, whole=True)
    _tell_shared("train", train, test)
    _tell_shared("choose the best model", valid, test)
    return FinetuneData(train, valid, test)


def _tell_shared(use: str, used: dict[str, GraphQuestions], test: dict[str, GraphQuestions]) -> None:
    """Says of test questions that they are also used for something else, so that their scores are too good."""
    for name, part in test.items():
        theirs = {text for other in used.values() if other.graph is part.graph for text in other.questions.questions}
        shared = sum(text in theirs for text in part.questions.questions)
        if shared:
            note(
                f"{name}: {shared} of {len(part.questions)} test questions are also used to {use}, so their scores "
                "are not those of a test; see datasets.valid_names, test_names and their splits"
            )


def has_split(name: str, datasets: GFMDatasets) -> bool:
    """Whether a data set has a file of test questions."""
    if name == SMALL_WORLD:
        return True
    folder = Path(find_dataset(name, datasets.root))
    return any(
        (folder / part / f"{datasets.test_split}.json").is_file() for part in ("processed/stage1", "stage1", ".")
    )


def hold_out_questions(questions: QuestionSet, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Parts a set in two, so that no supporting document stands on both sides.

    Questions that share a supporting document form a group; groups go to the held-out side in a seeded random order
    until it has `share` of the whole questions (those that are not parts of others). Parts of held-out questions are
    on neither side of the score: they are left out of training, and not scored.

    Args:
        questions: The set.
        share: Share of the whole questions that is held out; where no group is small enough for it, the smallest. All
            questions of one group stay to be trained on.
        seed: Seed of the order.

    Returns:
        (places to train on, places held out), both ascending.
    """
    documents = [questions.supporting_documents[i].tolist() for i in range(len(questions))]
    return hold_out(documents, share, seed, [not bool(part) for part in questions.is_part])
