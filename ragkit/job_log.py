"""The log of a job: its last lines, and why its command ended as it did."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

TAIL = 65536  # bytes of the log that are looked at
_LAUNCHER = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError"  # torchrun's summary follows
_RANK = re.compile(r"^\[rank\d+\]:\s?")
_ERROR = re.compile(r"(?:\w+\.)*[A-Z]\w*(?:Error|Exception)\b(?:: .*)?")
_SIGNAL = re.compile(r"Signal \d+ \((\w+)\) received")
_LAUNCHER_SAYS = re.compile(r"[EWI]\d{4} [\d:.]+ \d+ torch/")  # E1126 09:56:17.697000 30583 torch/distributed/...
_RULER = re.compile(r"[=\-*_ ]*")


def last_lines(path: Path, count: int, start: int = 0) -> list[str]:
    """The last lines of a log; empty where there is none.

    Args:
        path: The file.
        count: Lines at most.
        start: What stands before this byte is left out.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(start, os.fstat(file.fileno()).st_size - TAIL))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return text.splitlines()[-count:]


def why(status: int, error: str | None, lines: list[str]) -> tuple[str, str | None]:
    """The state and the error of a command that ended with a status other than 0.

    Args:
        status: Its exit status; below 0 the signal that ended it.
        error: What its training has written down, if it has.
        lines: The end of its log.
    """
    if status == 130:  # Ctrl-C
        return "interrupted", None
    if status < 0:
        name = signal.Signals(-status).name if -status in list(signal.Signals) else f"signal {-status}"
        return "interrupted", f"its process {_ended_by(name)}"
    return "failed", error or error_line(lines) or f"the command ended with status {status}"


def _ended_by(name: str) -> str:
    more = ": the machine may have run out of memory" if name == "SIGKILL" else ""
    return f"was ended from outside ({name}){more}"


def error_line(lines: list[str]) -> str | None:
    """The line of a command that failed, which says why: its own, or else an exception's; None if there is none.

    Under torchrun a summary follows, which says by which signal the first process that failed was ended, if by one;
    what the other processes say then is only that it is gone.

    Args:
        lines: The end of its log.
    """
    end = max((n for n, line in enumerate(lines) if line.startswith(_LAUNCHER)), default=len(lines))
    summary = lines[end:]
    if summary:  # the exception that it belongs to is torchrun's too
        end = max((n for n, line in enumerate(lines[:end]) if line.startswith("Traceback")), default=end)
    cause = next((number for number, line in enumerate(summary) if line.startswith("Root Cause")), len(summary))
    for found in map(_SIGNAL.search, summary[cause:]):
        if found:
            return f"one of its processes {_ended_by(found[1])}"
    said = [_RANK.sub("", line).strip() for line in lines[:end]]
    said = [line for line in said if not _RULER.fullmatch(line) and not _LAUNCHER_SAYS.match(line)]
    ours = next((line for line in reversed(said) if line.startswith("ragkit: ")), None)
    if ours:
        return ours.removeprefix("ragkit: ")
    errors = [line for line in said if _ERROR.fullmatch(line)] if summary else []
    return errors[-1] if errors else said[-1] if said else None
