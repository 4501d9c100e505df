"""python -m ragkit.dev COMMAND: execute, docs, screenshots."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ragkit.dev.execute import NotebookError, execute, find
from ragkit.tables import text_table

USAGE = "python -m ragkit.dev execute [NUMBER ...]   runs notebooks (all, or 03 05 ...), stores them in one form"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0, 1 where something failed, 2 where it was not given rightly."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["execute"]:
        return _execute(given[1:])
    print(USAGE)
    return 0 if given[:1] in (["-h"], ["--help"]) else 2


def _execute(names: Sequence[str]) -> int:
    rows = [["notebook", "seconds", "cells", "kB"]]
    try:
        for path in find(names):
            done = execute(path)
            rows.append([path.stem, f"{done.seconds:.0f}", str(done.cells), f"{done.size / 1000:.0f}"])
            print(f"{path.stem}: {done.seconds:.0f} s", flush=True)
    except NotebookError as error:
        print(f"ragkit.dev: {error}", file=sys.stderr)
        return 1
    print(text_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
