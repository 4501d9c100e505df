"""The engine in two real processes (gloo, CPU); `test_engine_processes.py FOLDER RANK` is what they run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import TORCHRUN

from ragkit.runs import Run

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
# The first process says its own loss in test_engine.py too.
@pytest.mark.parametrize("bad", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_loss_that_is_not_finite_on_one_process_is_said_by_the_first(tmp_path, bad):
    import engine_job as job

    run = Run.create(job.SETTINGS, tmp_path, name="run")
    places = [ROOT, ROOT / "kernels", ROOT / "tests" / "helpers"]
    done = subprocess.run(
        [*TORCHRUN, __file__, str(run.dir), str(bad)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode != 0
    told = [(tmp_path / f"run-{rank}.txt").read_text() for rank in (0, 1)]
    assert told[0] == told[1] and told[0].startswith("NonFiniteLossError: the loss is nan at step 2 in the batch of ")
    state = run.state()
    assert state.name == "failed" and f"NonFiniteLossError: {state.error}" == told[0]
    assert [event["error"] for event in run.events() if "error" in event] == [state.error]
    assert (tmp_path / "run-ids.txt").read_text() in state.error  # the batch of the process whose loss it was
    assert [event["step"] for event in run.events() if "loss" in event] == [1]


if __name__ == "__main__":
    import engine_job as job

    from ragkit.engine import run_training
    from ragkit.processes import join, leave, rank

    run, bad = Run.open(sys.argv[1]), int(sys.argv[2])
    join("cpu")
    calls = []

    def loss(model, batch):
        calls.append(batch["ids"])
        value = job.squared_error(model, batch)
        if rank() == bad and len(calls) == 3:  # the first of the two batches of step 2
            run.dir.with_name("run-ids.txt").write_text(", ".join(batch["ids"]))
            return value * float("nan")
        return value

    config = job.SETTINGS.model_copy(update={"gradient_accumulation_steps": 2, "batch_size": 2})
    try:
        run_training(job.plain(run, config, loss_fn=loss))
    except Exception as error:
        run.dir.with_name(f"run-{rank()}.txt").write_text(f"{type(error).__name__}: {error}")
        raise
    finally:
        leave()
