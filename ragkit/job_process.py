"""The process that stands over a job: starts the command, waits for it, and writes down how it ended.

`python -m ragkit.job_process runs/NAME.job/job.json` is started by `ragkit.jobs.Job` in a session of its own, so that
the command outlives the notebook, and whoever comes later can read its exit status.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from ragkit.files import atomic_write_json
from ragkit.run_state import created


def main(path: Path) -> int:
    """Runs the command of a `job.json`, and adds to it: pid, child, when both were created, and exit."""
    record = json.loads(path.read_text(encoding="utf-8"))
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            # They are meant for the command; we stay to see how it ends. "Ignore" would be inherited, this is not.
            signal.signal(getattr(signal, name), lambda number, frame: None)
    pid = os.getpid()
    record |= {"pid": pid, "created": created(pid), "child": None, "child_created": None, "exit": None}
    _write(path, record)
    try:
        child = subprocess.Popen(record["arguments"], stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"ragkit: the command cannot be started: {error}", flush=True)
        _write(path, {**record, "exit": 2})
        return 2
    record |= {"child": child.pid, "child_created": created(child.pid)}
    _write(path, record)
    record["exit"] = child.wait()
    _write(path, record)
    return 0


def _write(path: Path, record: dict[str, Any]) -> None:
    """Writes the record; where the disk is full, over the one that is there, whose place it has."""
    try:
        atomic_write_json(path, record)
    except OSError:
        data = json.dumps(record, ensure_ascii=False).encode()
        with path.open("r+b", buffering=0) as file:
            file.write(data)
            file.truncate(len(data))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
