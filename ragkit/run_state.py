"""How a run stands: who works on it now, how far it is, how it ended. Read from its files, without PyTorch.

While a training runs, it holds a lock on `state.json` in the run folder. The system lets go of it when the process
ends, however it ends, so a run whose file says "running" but whose lock is free was cut off.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragkit.files import is_locked, try_lock
from ragkit.optional import require

FILE = "state.json"
JOB = "RAGKIT_JOB"  # environment variable of a job's processes: the token of this start of it
ENDS = ("stopped", "finished", "failed", "interrupted")


class BusyError(RuntimeError):
    """Somebody works on the run already."""


@dataclass(frozen=True)
class RunState:
    """How a run stands.

    Attributes:
        name: "new" (nothing was trained), "running", "stopped" (on request), "finished", "failed" (with an error),
            "interrupted" (its process is gone) or "missing" (there is no such folder).
        step: The last step that has an event.
        total: Steps of the whole run; None until there is an event.
        error: What ended it, in words; None if nothing did.
        facts: Who works (or worked last) on it: pid, host, began, program, job, device, threads,
            processes.
    """

    name: str
    step: int = 0
    total: int | None = None
    error: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        where = f" at step {self.step} of {self.total}" if self.total else ""
        return f"{self.name}{where}" + (f": {self.error}" if self.error else "")


# ---- the lock ----


class Hold:
    """The lock on a run; `end` says how the training ended."""

    def __init__(self, handle: int, record: dict[str, Any]) -> None:
        self._handle, self._record = handle, record

    def end(self, state: str, error: str | None = None) -> None:
        """Writes down how it ended: one of "stopped", "finished", "failed" and "interrupted"."""
        self._record |= {"state": state, "error": error}
        self._write()

    def _write(self) -> None:
        # In place: the lock is on this file, one that is renamed over it would be without.
        data = json.dumps(self._record, ensure_ascii=False).encode() + b"\n"
        os.ftruncate(self._handle, 0)
        os.lseek(self._handle, 0, os.SEEK_SET)
        os.write(self._handle, data)


@contextmanager
def hold(folder: Path, facts: dict[str, Any] | None = None) -> Iterator[Hold]:
    """Holds a run for this process while the block runs.

    Args:
        folder: The run folder.
        facts: What others shall know of it (device, threads, processes).

    Raises:
        BusyError: Another training holds it.
    """
    handle = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        locked = _lock_in_time(handle)
        before = read_record(folder)
        if locked is False or (locked is None and _process_lives(before)):
            raise BusyError(f"{_who(before)} works on it")
        record = {
            "state": "running",
            "pid": os.getpid(),
            "created": created(os.getpid()),
            "host": socket.gethostname(),
            "began": time.time(),
            "program": _program(),
            "job": os.environ.get(JOB),
            "locked": locked is True,
            **(facts or {}),
        }
        held = Hold(handle, record)
        held._write()
        try:
            yield held
        except Exception as error:
            if record["state"] == "running":
                _end(held, "failed", one_line(error))
            raise
        except BaseException:
            _end(held, "interrupted", None)
            raise
    finally:
        os.close(handle)  # which also lets go of the lock


def _end(held: Hold, state: str, error: str | None) -> None:
    with suppress(OSError):  # a full disk: the training's own error is what counts
        held.end(state, error)


def _lock_in_time(handle: int, seconds: float = 1.0) -> bool | None:
    """Takes the lock; waits a little, because others look for a moment whether it is held."""
    deadline = time.monotonic() + seconds
    while True:
        locked = try_lock(handle)
        if locked is not False or time.monotonic() > deadline:
            return locked
        time.sleep(0.05)


def is_held(folder: Path, record: dict[str, Any] | None = None) -> bool:
    """Whether a training works on the run in this moment."""
    record = read_record(folder) if record is None else record
    held = is_locked(folder / FILE)
    return held if held is not None and record.get("locked", True) else _process_lives(record)


def check_free(folder: Path) -> None:
    """Looks whether a training could hold the run.

    Raises:
        BusyError: Another training holds it.
    """
    record = read_record(folder)
    if is_held(folder, record):
        raise BusyError(f"{_who(record)} works on it")


def _process_lives(record: dict[str, Any]) -> bool:
    """Where there are no locks: whether the process of a record is there; one of another host is believed."""
    if record.get("state") != "running":
        return False
    if record.get("host") != socket.gethostname():
        return True
    return is_process(record["pid"], record.get("created"))


def created(pid: int) -> float | None:
    """When a process was created (seconds); None if there is none of this number."""
    psutil = require("psutil")
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def is_process(pid: int | None, when: float | None) -> bool:
    """Whether the process of a number and a creation time lives; a number alone may be another program's by now."""
    now = created(pid) if pid else None
    return now is not None and (when is None or abs(now - when) < 2.0)


def _program() -> str:
    """The kind of this process: ragkit, a command of `python -m ragkit`, or python, whose objects go with it."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return "ragkit" if getattr(spec, "name", None) == "ragkit.__main__" else "python"


def _who(record: dict[str, Any]) -> str:
    if "pid" not in record:
        return "another process"
    if record["pid"] == os.getpid() and record.get("host") == socket.gethostname():
        return "another training of this process"
    return f"the process {record['pid']} on {record.get('host', 'this machine')}"


def one_line(error: BaseException) -> str:
    """An error as one line of text."""
    return " ".join(str(error).split()) or type(error).__name__


# ---- the state ----


def read_record(folder: Path) -> dict[str, Any]:
    """The content of `state.json`; empty where there is none, or only half of one."""
    for _ in range(3):  # it is written in place: a reader may see it between two states
        try:
            record = json.loads((folder / FILE).read_text(encoding="utf-8"))
            return record if isinstance(record, dict) else {}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (ValueError, OSError):
            time.sleep(0.01)
    return {}


def state_of(folder: Path, events: EventReader | None = None, metrics: dict[str, Any] | None = None) -> RunState:
    """How the run of a folder stands.

    Args:
        folder: The run folder.
        events: A reader that is kept from look to look; None: the events are read from their beginning.
        metrics: The run's metrics, for runs from before `state.json`.
    """
    if not (folder / "config.yaml").is_file():
        return RunState("missing")
    reader = EventReader(folder / "events.jsonl") if events is None else events
    reader.read()
    record = read_record(folder)
    facts = {name: value for name, value in record.items() if name not in ("state", "error", "locked")}
    error = record.get("error") or (reader.error if record.get("state") != "running" else None)
    if is_held(folder, record):
        return RunState("running", reader.step, reader.total, None, facts)
    if record.get("state") in ENDS:
        name = record["state"]
    elif record:
        name = "interrupted"
    elif metrics and "stopped" in metrics:
        name = "stopped" if metrics["stopped"] else "finished"
    else:
        name = "failed" if reader.error else "interrupted" if reader.events else "new"
    return RunState(name, reader.step, reader.total, error if name == "failed" else None, facts)


class EventReader:
    """Reads the events of a run bit by bit, for one who watches it: it only looks at what was added.

    Attributes:
        events: All events so far, in order.
        bad: Lines that are no events (a torn or damaged file), which are passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.bad = 0
        self._offset = 0
        self._file: int | None = None

    @property
    def step(self) -> int:
        """The last step that has an event."""
        return max((int(event.get("step") or 0) for event in self.events[-50:] if "error" not in event), default=0)

    @property
    def total(self) -> int | None:
        """Steps of the whole run."""
        return next((int(event["total"]) for event in reversed(self.events) if event.get("total")), None)

    @property
    def error(self) -> str | None:
        """The error that the last event tells of."""
        return self.events[-1].get("error") if self.events else None

    def last(self, name: str) -> Any:
        """The last value of a name, or None."""
        return next((event[name] for event in reversed(self.events) if event.get(name) is not None), None)

    def read(self) -> bool:
        """Reads what was added; True if the events are other ones than before."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                changed = False
                if self._file is not None and (status.st_ino != self._file or status.st_size < self._offset):
                    self._forget()  # a resumed run has dropped its later events: it is a new file
                    changed = True
                self._file = status.st_ino
                if status.st_size == self._offset:
                    return changed
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return False
        whole = data[: data.rfind(b"\n") + 1]  # what follows the last line break is half a line
        for line in whole.splitlines():
            event = _event(line)
            if event is None:
                self.bad += bool(line.strip())
            else:
                self.events.append(event)
        self._offset += len(whole)
        return changed or bool(whole)


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("step", 0), int):
        return None
    return event
