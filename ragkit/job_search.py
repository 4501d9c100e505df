"""Finds runs again, those that a process of their own trains and others."""

from __future__ import annotations

from pathlib import Path

from ragkit.job_commands import command_of_run
from ragkit.jobs import Job
from ragkit.runs import Run


def latest(root: str | Path = "runs", command: str | None = None) -> Path | None:
    """The run that was begun last, with those that are just being started; None if there is none.

    Args:
        root: Folder that holds the run folders.
        command: Only runs of this command ("lsr", ...); None: of any.
    """
    found: list[tuple[float, Path]] = []
    root = Path(root)
    for path in root.iterdir() if root.is_dir() else []:
        if path.name.endswith(".job") and (path / "job.json").is_file():
            job = Job(path.with_name(path.name.removesuffix(".job")))
            if not job.run.dir.exists() and job.alive and command in (None, job.record().get("kind")):
                found.append((float(job.record().get("started", 0.0)), root / job.run.name))
        elif (path / "config.yaml").is_file():
            run = Run(path)
            if command is None or command_of_run(run, Job(path).record()) == command:
                when = max(file.stat().st_mtime for file in (run.config_path, path / "state.json") if file.exists())
                found.append((when, path))
    return max(found)[1] if found else None
