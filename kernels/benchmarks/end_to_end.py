"""What a user waits for: `python -m ragkit quickstart` and `import ragkit`, each in a process of its own.

    python kernels/benchmarks/end_to_end.py [--csv results.csv] [--imports 7] [key=value ...]

The rest of the command line goes to quickstart. Seconds on a busy machine say little: run it on a quiet one.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

FIELDS = ["date", "what", "device", "cores", "commit", "seconds", "cpu_seconds", "peak_mib"]


def run(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak resident MiB of a process and its children.

    Raises:
        RuntimeError: The process failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    wall = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, after.ru_maxrss / 1024  # kilobytes on Linux


def commit() -> str:
    """The short hash of HEAD."""
    here = Path(__file__).parent
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True
    ).stdout.strip()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--imports", type=int, default=7)
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    imports = [run([sys.executable, "-c", "import ragkit"]) for _ in range(args.imports)]
    rows = [("import ragkit", *(median(column) for column in zip(*imports, strict=True)))]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ragkit", "quickstart", f"output_dir={folder}", *args.settings]
        rows.append((" ".join(["quickstart", *args.settings]), *run(command)))
    for what, wall, cpu, peak in rows:
        print(f"{what:30s} {wall:8.2f} s  {cpu:8.2f} CPU s  peak {peak:6.0f} MiB")
    if args.csv is not None:
        new = not args.csv.exists()
        with args.csv.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(FIELDS)
            for what, wall, cpu, peak in rows:
                today = datetime.date.today().isoformat()
                cells = [today, what, "cpu", os.cpu_count(), commit(), f"{wall:.2f}", f"{cpu:.2f}", f"{peak:.0f}"]
                writer.writerow(cells)


if __name__ == "__main__":
    main()
