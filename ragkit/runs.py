"""One run on disk: a folder with config.yaml, events.jsonl, checkpoints/ and metrics.json.

Files only: a panel, a notebook or another process reads a run, and stops it, without loading PyTorch.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import yaml

from ragkit.files import atomic_write_json, atomic_write_text, exclusive
from ragkit.run_state import BusyError, Hold, RunState, check_free, hold, state_of

CHECKPOINT_MARKER = "ragkit_complete.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunError(RuntimeError):
    """A run folder that is missing, half-written, corrupt or already in use."""


class _HasYaml(Protocol):
    def to_yaml(self) -> str: ...


class Run:
    """A run folder. Make one with `Run.create`, open an existing one with `Run.open`.

    Attributes:
        dir: The folder.
        config_path: `config.yaml`, the settings of the run.
        events_path: `events.jsonl`, one JSON object a line (step, total, loss, learning_rate, ...).
        metrics_path: `metrics.json`, the results.
        checkpoints_dir: Folder of the `checkpoint-N` folders.
    """

    def __init__(self, path: str | Path):
        self.dir = Path(path)
        self.config_path = self.dir / "config.yaml"
        self.events_path = self.dir / "events.jsonl"
        self.metrics_path = self.dir / "metrics.json"
        self.checkpoints_dir = self.dir / "checkpoints"
        self._stop_path = self.dir / "stop"
        self._resumes = False

    def __repr__(self) -> str:
        return f"Run({str(self.dir)!r})"

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.dir.name

    # ---- make and open ----

    @classmethod
    def create(cls, config: _HasYaml, root: str | Path = "runs", name: str | None = None) -> Run:
        """Makes a new run folder and writes its config.yaml.

        Args:
            config: Settings of the run (any `ragkit.config.Config`).
            root: Folder that holds the run folders; made if missing.
            name: Name of the run; None: the kind of the settings and the time, made unique.

        Raises:
            RunError: The name is not usable as a folder name, or a run of that name exists.
        """
        root = Path(root)
        if name is not None:
            run = cls(root / check_name(name))
            if run.dir.exists():
                raise RunError(f'there is a run "{run.dir}" already; choose another name, or open it with Run.open')
            run.dir.mkdir(parents=True)
        else:
            run = cls(_new_folder(root, type(config).__name__.removesuffix("Config").lower()))
        atomic_write_text(run.config_path, config.to_yaml())
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Opens an existing run folder and checks that its files can be read.

        Raises:
            RunError: Not a folder, no config.yaml, or one of the files is corrupt; the message names file and line.
        """
        run = cls(path)
        if not run.dir.is_dir():
            raise RunError(f'there is no run folder "{run.dir}"{_neighbours(run.dir)}')
        if not run.config_path.is_file():
            raise RunError(f'"{run.dir}" is not a run folder (or a half-written one): it has no config.yaml')
        run.config()
        run.events()
        run.metrics()
        return run

    def config(self) -> dict[str, Any]:
        """The settings as plain values (`load_config(LSRConfig, run.config_path)` gives the object)."""
        try:
            values = yaml.safe_load(self.config_path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RunError(f"{self.config_path}: cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise RunError(f"{self.config_path}: expected a mapping, found a {type(values).__name__}")
        return values

    # ---- events ----

    def log(self, event: dict[str, Any]) -> None:
        """Appends one event as one whole line (numbers that are not finite become null) and flushes it."""
        line = (json.dumps(_plain(event), ensure_ascii=False, allow_nan=False) + "\n").encode()
        handle = os.open(self.events_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            # Alone: a long line of another writer grows page by page, and half of it must not be taken for a torn one.
            with exclusive(handle):
                size = os.fstat(handle).st_size
                if size and _byte_at(handle, size - 1) != b"\n":
                    # The writer before us was killed in the middle of a line: that half is not an event.
                    os.ftruncate(handle, self.events_path.read_bytes().rfind(b"\n") + 1)
                os.write(handle, line)  # one write: a reader never sees two halves of two writers mixed
        finally:
            os.close(handle)

    def events(self) -> list[dict[str, Any]]:
        """All events in order; a half-written last line (a killed writer) is left out.

        Raises:
            RunError: A line before the last one is not a JSON object.
        """
        return list(self._lines())

    def truncate_events(self, step: int) -> int:
        """Drops the events of steps after `step` (a resumed run does them again).

        Returns:
            How many events were dropped.
        """
        events = self.events()
        kept = [event for event in events if event.get("step", 0) <= step]
        if len(kept) < len(events):
            atomic_write_text(self.events_path, "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in kept))
        return len(events) - len(kept)

    def _lines(self) -> Iterator[dict[str, Any]]:
        try:
            data = self.events_path.read_bytes()
        except FileNotFoundError:
            return
        lines = data.split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last line break is half a line
            try:
                event = json.loads(line)
                if not isinstance(event, dict):
                    raise ValueError(f"expected an object, found {type(event).__name__}")
            except ValueError as error:
                raise RunError(f"{self.events_path}, line {number}: not an event: {error}") from error
            yield event

    # ---- metrics ----

    def write_metrics(self, values: dict[str, Any]) -> dict[str, Any]:
        """Writes `values` over the metrics that are there (other names stay) atomically; returns all of them."""
        merged = {**self.metrics(), **_plain(values)}
        atomic_write_json(self.metrics_path, merged)
        return merged

    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json; empty if nothing was written yet."""
        try:
            values = json.loads(self.metrics_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise RunError(f"{self.metrics_path}: not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise RunError(f"{self.metrics_path}: expected an object, found a {type(values).__name__}")
        return values

    # ---- who works on it, and how it stands ----

    def state(self) -> RunState:
        """How the run stands: new, running, stopped, finished, failed or interrupted, with step and last error."""
        try:
            metrics = self.metrics()
        except RunError:
            metrics = {}
        return state_of(self.dir, metrics=metrics)

    @contextmanager
    def hold(self, **facts: Any) -> Iterator[Hold]:
        """Holds the run for one training, which says at the end how it ended (`Hold.end`).

        Args:
            **facts: What others shall know of the training (device, threads, processes).

        Raises:
            RunError: A training works on this run already.
        """
        try:
            with hold(self.dir, facts) as held:
                yield held
        except BusyError as error:
            raise RunError(self._busy(error)) from None
        except FileNotFoundError as error:
            if self.dir.is_dir():
                raise
            raise RunError(f'the run folder "{self.dir}" is gone: it was deleted or moved ({error})') from error

    def _busy(self, error: BusyError) -> str:
        return (
            f'the run "{self.dir}" is being trained: {error}. Watch it with RunPanel.attach("{self.dir}"), or end it '
            f'with Run.open("{self.dir}").request_stop() and try again'
        )

    def begin_resume(self, forget: bool = True) -> None:
        """Begins to go on with the run; to be called by one process, before anything is loaded or prepared for it.

        A request to stop that is there already is an old one, and is forgotten (not with `forget=False`). From now on
        requests hold: further calls forget nothing until `end_resume`.

        Raises:
            RunError: A training works on this run.
        """
        try:
            check_free(self.dir)
        except BusyError as error:
            raise RunError(self._busy(error)) from None
        if forget and not self._resumes:
            self.clear_stop()
        self._resumes = True

    def end_resume(self) -> None:
        """The training that went on with the run has ended: requests from now on are old ones for the next."""
        self._resumes = False

    # ---- stop ----

    def request_stop(self) -> None:
        """Asks the training (in whatever process) to save a checkpoint and end at its next step."""
        atomic_write_text(self._stop_path, "stop\n")

    def clear_stop(self) -> None:
        """Takes the request back."""
        self._stop_path.unlink(missing_ok=True)

    @property
    def stop_requested(self) -> bool:
        """Whether somebody asked the training to stop."""
        return self._stop_path.exists()

    # ---- checkpoints ----

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints by step, without what a killed process left half-written or half-deleted."""
        return [path for path, _ in self._checkpoint_folders() if checkpoint_is_complete(path)]

    def last_checkpoint(self) -> Path | None:
        """The complete checkpoint with the highest step, or None."""
        for path, _ in reversed(self._checkpoint_folders()):
            if checkpoint_is_complete(path):
                return path
        return None

    def drop_old_checkpoints(self, keep: int | None) -> None:
        """Deletes all but the last `keep` complete checkpoints (None: deletes nothing)."""
        if keep:
            for path in self.checkpoints()[:-keep]:
                shutil.rmtree(path)

    def drop_checkpoints_after(self, step: int) -> None:
        """Deletes checkpoints of later steps, half-written ones too, so that a resumed run writes them afresh."""
        for path, number in self._checkpoint_folders():
            if number > step:
                shutil.rmtree(path)

    def _checkpoint_folders(self) -> list[tuple[Path, int]]:
        if not self.checkpoints_dir.is_dir():
            return []
        folders = [(path, checkpoint_step(path)) for path in self.checkpoints_dir.iterdir() if path.is_dir()]
        return sorted(((path, step) for path, step in folders if step >= 0), key=lambda pair: pair[1])


def check_name(name: str) -> str:
    """Returns `name` if it can be a folder name.

    Raises:
        RunError: It is empty, too long, or holds anything but letters, digits, dot, underscore and hyphen.
    """
    if not _NAME.fullmatch(name):
        raise RunError(
            f"{name!r} cannot be the name of a run: use 1 to 100 letters, digits, '.', '_' or '-', "
            "and begin with a letter or digit"
        )
    return name


def checkpoint_step(path: Path) -> int:
    """The step N of a folder `checkpoint-N`; -1 for any other folder."""
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def mark_complete(path: Path) -> None:
    """Flushes a finished checkpoint to the disk and writes down its files and sizes.

    A later look can then tell a whole checkpoint from one that lost a file or a part of one.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != CHECKPOINT_MARKER)
    for file in files:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    atomic_write_json(
        path / CHECKPOINT_MARKER, {file.relative_to(path).as_posix(): file.stat().st_size for file in files}
    )


def checkpoint_is_complete(path: Path) -> bool:
    """Whether everything in a `checkpoint-N` folder was written to the end.

    transformers writes into the final folder, the weights first and trainer_state.json last, so a state that parses
    and names this step says that all is there; our marker then adds the sizes (a folder that is being deleted, or was
    copied in part, fails them). The state alone is enough because a process may die between the two.
    """
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict) or state.get("global_step") != checkpoint_step(path):
            return False
        if not all(_safetensors_is_whole(file) for file in path.glob("*.safetensors")):
            return False
        marker = path / CHECKPOINT_MARKER
        sizes = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else {}
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError, struct.error):
        return False


def _safetensors_is_whole(path: Path) -> bool:
    """Compares the size of a safetensors file with what its header announces; reads only the header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    return path.stat().st_size == 8 + length + end


def _new_folder(root: Path, kind: str) -> Path:
    """Makes `root/kind-TIME`, with -2, -3 ... where that exists."""
    stem = f"{kind or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    root.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        path = root / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            continue
    raise RunError(f'"{root}" holds too many runs named {stem}')


def _neighbours(path: Path) -> str:
    """Names a few run folders beside a missing one."""
    if not path.parent.is_dir():
        return ""
    names = sorted(folder.name for folder in path.parent.iterdir() if (folder / "config.yaml").is_file())
    return f"; in {path.parent} there are: {', '.join(names[-5:])}" if names else ""


def _plain(value: Any) -> Any:
    """Numbers of NumPy and PyTorch as Python numbers, paths as text, numbers that are not finite as None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise TypeError(f"cannot be written as JSON: {value!r} ({type(value).__name__})")


def _byte_at(handle: int, position: int) -> bytes:
    os.lseek(handle, position, os.SEEK_SET)
    return os.read(handle, 1)
