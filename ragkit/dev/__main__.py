"""python -m ragkit.dev COMMAND: execute, docs, screenshots."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ragkit.dev.docs import DocsError, build
from ragkit.dev.execute import NotebookError, check, execute, find
from ragkit.dev.lab import LabError
from ragkit.dev.screenshots import screenshots
from ragkit.tables import text_table

USAGE = """python -m ragkit.dev COMMAND

  execute [--check] [NUMBER ...]   runs notebooks (all, or 03 05 ...) and stores them in one form; with --check nothing
                                   is stored, and what they print must be what they store
  docs [--out FOLDER]              builds the documentation site (site/) and checks its links
  screenshots                      takes the README's pictures of form, panel and graph view (needs Chromium)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0, 1 where something failed, 2 where it was not given rightly."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["execute"]:
        return _execute(given[1:])
    if given[:1] == ["docs"] and (len(given) == 1 or (len(given) == 3 and given[1] == "--out")):
        return _docs(Path(given[2] if len(given) == 3 else "site"))
    if given == ["screenshots"]:
        return _screenshots()
    print(USAGE)
    return 0 if given[:1] in (["-h"], ["--help"]) else 2


def _docs(out: Path) -> int:
    try:
        print(build(out))
    except DocsError as error:
        print(f"ragkit.dev: {error}", file=sys.stderr)
        return 1
    return 0


def _screenshots() -> int:
    try:
        for path in screenshots():
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB", flush=True)
    except (LabError, ImportError) as error:
        print(f"ragkit.dev: {error}", file=sys.stderr)
        return 1
    return 0


def _execute(names: Sequence[str]) -> int:
    only_check = "--check" in names
    rows = [["notebook", "seconds", "cells", "kB", "peak MB"]]
    failed = 0
    try:
        paths = find([name for name in names if name != "--check"])
    except NotebookError as error:
        print(f"ragkit.dev: {error}", file=sys.stderr)
        return 2
    for path in paths:
        try:
            if only_check:
                check(path)
                print(f"{path.stem}: prints what it stores", flush=True)
            else:
                done = execute(path)
                sizes = (done.cells, round(done.size / 1000), round(done.memory / 1e6))
                rows.append([path.stem, f"{done.seconds:.0f}", *map(str, sizes)])
                print(f"{path.stem}: {done.seconds:.0f} s", flush=True)
        except NotebookError as error:  # the others are still run
            print(f"ragkit.dev: {error}", file=sys.stderr, flush=True)
            failed += 1
    if len(rows) > 1:
        print(text_table(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
