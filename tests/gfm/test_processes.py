"""Two real processes (gloo, CPU) train and score as one process with a batch twice as large, to rounding."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import processes_job as job
import pytest
import torch
from launching import TORCHRUN

from ragkit.gfm import load_gfm
from ragkit.gfm.training import best_of
from ragkit.runs import Run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

KINDS = ["finetune", "pretrain"]


def write_questions(root):
    """Sizes that leave a last batch of 3 (for two processes: 1 and 2) and one of 1 (0 and 1); odd numbers of
    questions to score, and a validation set of a single one."""
    for name, train, test, dev, seed in (("left", 21, 9, 7, 1), ("right", 13, 5, 1, 2)):
        stage = root / name / "processed" / "stage1"
        job.finetune_job.write_dataset(root / name, people=12, seed=seed, train=train, test=test)
        (stage / "dev.json").write_text(json.dumps(json.loads((stage / "test.json").read_text())[:dev]))


def task(root, kind, name, batch_size, **more):
    train = {"batch_size": batch_size, "num_epoch": 3, "eval_batch_size": 4, "save_steps": None}
    if kind == "finetune":
        data = {"valid_names": ["left", "right"], "valid_split": "dev", "test_names": ["left", "right"]}
        config = job.finetune_job.config(root / "questions", name=name, train=train, datasets=data)
    else:
        changes = {"max_valid": 5}
        config = job.pretrain_job.config(root / "facts", name=name, train=train, task=changes)
    return {"kind": kind, "name": name, "config": config.model_dump(mode="json"), **more}


def launch(folder, tasks):
    """Runs the tasks in two processes."""
    paths = []
    for number, one in enumerate(tasks):
        paths.append(folder / f"task{number}-{one['name']}.json")
        paths[-1].write_text(json.dumps(one))
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*TORCHRUN, job.__file__, str(folder), *map(str, paths)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs[kind]: what two processes ended with ("both"), one with twice the batch ("one"), and a stopped and
    resumed pair ("first", "resumed")."""
    root = tmp_path_factory.mktemp("processes")
    (root / "facts").mkdir()
    write_questions(root / "questions")
    job.pretrain_job.write_two(root / "facts")
    threads = torch.get_num_threads()
    one = {kind: job.work(task(root, kind, f"{kind}-one", 6), root) for kind in KINDS}
    torch.set_num_threads(threads)
    launch(
        root,
        [task(root, kind, f"{kind}-two", 3) for kind in KINDS]
        + [task(root, kind, f"{kind}-stopped", 3, stop=9) for kind in KINDS],
    )
    first = {kind: read(root, f"{kind}-stopped") for kind in KINDS}
    launch(root, [task(root, kind, f"{kind}-stopped", 3, resume=True) for kind in KINDS])
    return {
        kind: {
            "one": one[kind],
            "both": read(root, f"{kind}-two"),
            "first": first[kind],
            "resumed": read(root, f"{kind}-stopped"),
            "root": root,
        }
        for kind in KINDS
    }


def read(root, name):
    return [torch.load(root / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]


def curve(found, *names):
    return [
        [event[name] for name in names] for event in found["history"] if all(event.get(n) is not None for n in names)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_curve_is_that_of_one_process(runs, kind):
    one, two = runs[kind]["one"], runs[kind]["both"][0]
    wanted, found = curve(one, "loss", "grad_norm"), curve(two, "loss", "grad_norm")
    assert one["steps"] == two["steps"] == len(wanted) == len(found) > 10
    assert all(a == pytest.approx(b, rel=1e-5, abs=1e-7) for a, b in zip(found, wanted, strict=True))
    assert len({tuple(row) for row in wanted}) == len(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_one_process_in_both(runs, kind):
    one, (first, second) = runs[kind]["one"]["weights"], [found["weights"] for found in runs[kind]["both"]]
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)
    where = runs[kind]["root"] / ("questions" if kind == "finetune" else "facts") / "runs" / f"{kind}-two"
    kept = load_gfm(where / "model").state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after", "valid"])
def test_every_question_is_scored_once_and_as_one_process_does(runs, kind, when):
    one, both = runs[kind]["one"][when], [found[when] for found in runs[kind]["both"]]
    assert both[0] == both[1]
    assert both[0] == one
    sizes = {name: len(scores["ids"]) for name, scores in one.items()}
    if kind == "finetune":
        assert sizes == ({"left": 7, "right": 1} if when == "valid" else {"left": 9, "right": 5})
    else:
        assert set(sizes) == {"left", "right"} and all(size % 2 == 0 and (size // 2) % 2 for size in sizes.values())
    assert all(len(set(scores["ids"])) == len(scores["ids"]) for scores in one.values())


@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_while_training_are_those_of_one_process(runs, kind):
    metric = "eval_ent_mrr" if kind == "finetune" else "eval_mrr"
    names = [metric, metric.replace("eval_", "eval_left/"), metric.replace("eval_", "eval_right/")]
    wanted, found = curve(runs[kind]["one"], *names), curve(runs[kind]["both"][0], *names)
    assert len(wanted) == 3 and found == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_is_unbroken(runs, kind):
    unbroken, first, resumed = (runs[kind][name] for name in ("both", "first", "resumed"))
    assert all(found["stopped"] for found in first) and first[0]["steps"] == first[1]["steps"] < unbroken[0]["steps"]
    assert not any(found["stopped"] for found in resumed)
    for found, wanted in zip(resumed, unbroken, strict=True):
        assert found["steps"] == wanted["steps"]
        assert found["history"] == wanted["history"]
        assert all(torch.equal(found["weights"][name], tensor) for name, tensor in wanted["weights"].items())
        assert found["after"] == wanted["after"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_run_folder_with_one_best_model(runs, kind):
    where = runs[kind]["root"] / ("questions" if kind == "finetune" else "facts") / "runs"
    assert {path.name for path in where.iterdir()} == {f"{kind}-one", f"{kind}-two", f"{kind}-stopped"}
    best = [best_of(Run.open(where / f"{kind}-{name}")) for name in ("one", "two", "stopped")]
    assert best[0] == best[1] == best[2]
