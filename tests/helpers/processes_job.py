"""The trainings of test_processes.py, in as many processes as there are: `processes_job.py FOLDER TASK.json ...`.

A task is {"kind", "name", "config"}, with "resume" to go on, or "stop" to stop at that batch. Each process writes
what it ended with to FOLDER/NAME-RANK.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import finetune_job
import pretrain_job
import torch

from ragkit import processes
from ragkit.config import GFMFinetuneConfig, GFMPretrainConfig
from ragkit.runs import Run


def trainer_of(task):
    if task["kind"] == "finetune":
        return finetune_job.make(GFMFinetuneConfig(**task["config"]))
    return pretrain_job.make(GFMPretrainConfig(**task["config"]))


def stop_at(trainer, number):
    """Batch `number` asks the first process to stop; the others have to hear of it."""
    make_batch, made = trainer.make_batch, []

    def stopping(key):
        made.append(key)
        if len(made) == number and processes.is_first():
            trainer.run.request_stop()
        return make_batch(key)

    trainer.make_batch = stopping


def scores(results):
    return {name: {"ids": result.ids, "values": result.to_dict()["values"]} for name, result in results.items()}


def work(task, folder):
    """Trains, and writes and returns what this process has then."""
    trainer = trainer_of(task)
    config, resume = trainer.config, bool(task.get("resume"))
    before = scores(trainer.test())
    where = Path(config.output_dir) / config.name
    trainer.run = (
        Run.open(where) if resume else processes.shared_run(lambda: Run.create(config, where.parent, where.name))
    )
    if task.get("stop"):
        stop_at(trainer, task["stop"])
    result = trainer.train(resume=resume)
    valid = trainer.gather(trainer.validate((processes.rank(), processes.world_size())), trainer.valid_ids)
    found = {
        "stopped": result.stopped,
        "steps": result.steps,
        "history": [{k: v for k, v in event.items() if k not in ("elapsed", "remaining")} for event in result.history],
        "before": before,
        "after": scores(trainer.test()),
        "valid": scores(valid),
        "weights": dict(trainer.model.state_dict()),
    }
    torch.save(found, Path(folder) / f"{task['name']}-{processes.rank()}.pt")
    return found


if __name__ == "__main__":
    processes.join("cpu")
    torch.set_num_threads(1)
    for path in sys.argv[2:]:
        work(json.loads(Path(path).read_text()), sys.argv[1])
    processes.leave()
