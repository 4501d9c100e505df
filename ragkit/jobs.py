"""A training command in a process of its own: it goes on when the notebook is closed, and is found again later.

Beside the run folder `runs/NAME` stands `runs/NAME.job`: the settings that the command was started with, its output
(`log.txt`), and `job.json` with its process and how it ended.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ragkit.config import Config
from ragkit.files import atomic_write_json, atomic_write_text
from ragkit.job_commands import command_of_run, training_of
from ragkit.job_log import last_lines, why
from ragkit.optional import require
from ragkit.run_state import JOB, EventReader, RunState, is_held, is_process, read_record, state_of
from ragkit.runs import Run, RunError, check_name

GRACE = 10.0  # seconds until a request to end is repeated more firmly
STARTING = 30.0  # seconds that a process may take to say its number


class Job:
    """A training command in a process of its own. Make one with `Job.start`, find one again with `Job.attach`.

    Attributes:
        run: The run folder that it writes (it may not be there yet).
        folder: `NAME.job` beside it: settings, output and `job.json`.
        events: The run's events as far as they were read.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run = Run(Path(run_dir).absolute())
        self.folder = self.run.dir.with_name(f"{self.run.name}.job")
        self.events = EventReader(self.run.events_path)
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: float | None = None  # when it was asked to end by a signal
        self._signals = 0
        self._seen = self.run.config_path.is_file()

    def __repr__(self) -> str:
        return f"Job({str(self.run.dir)!r}, {self.status()})"

    # ---- start, find, go on ----

    @classmethod
    def start(cls, config: Config, processes: int = 1) -> Job:
        """Starts `python -m ragkit COMMAND` with these settings.

        Args:
            config: Settings of a training command. Where they have no name, the run is given one now.
            processes: Processes on this machine; more than one are started by torchrun.

        Raises:
            RunError: The settings are not those of a training, there is a run of that name, or the folder cannot be
                written.
        """
        command = training_of(config)
        values: Any = config
        if processes < 1:
            raise RunError(f"processes: found {processes}, expected 1 or more")
        if values.resume is not None:
            job = cls.attach(values.resume)
            job.resume(processes)
            return job
        root = Path(values.output_dir)
        try:
            job = cls(_reserve(root, type(config).__name__.removesuffix("Config").lower(), values.name))
            settings = values.model_copy(update={"name": job.run.name})
            atomic_write_text(job.folder / "settings.yaml", settings.to_yaml())
            job._launch(command, [str(job.folder / "settings.yaml")], processes)
        except OSError as error:
            raise RunError(
                f"the run cannot be started: {error}. Its folder is made in output_dir ({root}); choose one that you "
                "may write to and that has room"
            ) from error
        return job

    @classmethod
    def attach(cls, run_dir: str | Path) -> Job:
        """Finds a run again, whoever started it.

        Raises:
            RunError: There is no such run, and none is being started.
        """
        job = cls(run_dir)
        if not job.folder.is_dir():
            Run.open(job.run.dir)  # says what is missing
        return job

    def resume(self, processes: int | None = None) -> None:
        """Goes on with the run in a new process, from its last checkpoint.

        Args:
            processes: As for `start`; None: as many as before.

        Raises:
            RunError: It is still running, there is nothing that a command could go on with, or its process cannot be
                started.
        """
        if self.alive or self.status().name == "running":
            raise RunError(f'the run "{self.run.dir}" is still running; stop it before you go on with it')
        command, reason = self.resumable()
        if command is None:
            raise RunError(reason)
        self.run.clear_stop()  # an old request; one that is made from now on is obeyed
        where = os.path.relpath(self.run.dir, self._cwd())
        where = str(self.run.dir) if where.startswith("..") else where
        self._launch(command, [f"resume={where}"], processes or self.processes())

    def processes(self) -> int:
        """As many processes as worked on the run last, whoever started them."""
        record, facts = self.record(), read_record(self.run.dir)
        latest = facts if _began_after(facts, record) else record
        return int(latest.get("processes") or record.get("processes") or 1)

    def resumable(self) -> tuple[str | None, str]:
        """(command that can go on with the run, "") or (None, why there is none)."""
        if not self.run.config_path.is_file():
            return None, f'there is no run folder "{self.run.dir}" to go on with; start a new run'
        facts = self.run.state().facts
        if not self.record() and facts.get("program") != "ragkit":
            # Its system was made by somebody's own code, which the settings do not tell of.
            return None, (
                f'the run "{self.run.dir}" was trained by Python code, not by a command, so its model is not known '
                f'here. Make the trainer again with run=Run.open("{self.run.dir}"), and press Resume in '
                "RunPanel(trainer), or call trainer.train(resume=True)"
            )
        command = command_of_run(self.run, self.record())
        if command is None:
            return None, f"{self.run.config_path} has no settings of a training command; start a new run"
        return command, ""

    def _launch(self, command: str, arguments: list[str], processes: int) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        whole = [sys.executable, *(launcher if processes > 1 else []), "-m", "ragkit", command, *arguments]
        cwd, token = self._cwd(), secrets.token_hex(8)
        record = {
            "kind": command,
            "arguments": whole,
            "processes": processes,
            "cwd": cwd,
            "started": time.time(),
            "token": token,  # is in the facts of the training that this process begins
            "log_start": self.log_path.stat().st_size if self.log_path.exists() else 0,
            "pid": None,
            "exit": None,
        }
        environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
        environment |= {"PYTHONUNBUFFERED": "1", JOB: token}
        before = self.record()
        try:
            self._spawn(record, environment)
        except OSError as error:
            with suppress(OSError):
                if before:  # how the process before ended
                    atomic_write_json(self.folder / "job.json", before)
                else:
                    (self.folder / "job.json").unlink(missing_ok=True)
            raise RunError(
                f'the run "{self.run.dir}" cannot be started: {error}. Its folder {cwd} must be there, and '
                f"{self.folder} one that you may write to and that has room"
            ) from error

    def _spawn(self, record: dict[str, Any], environment: dict[str, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = atomic_write_json(self.folder / "job.json", record)
        self._asked, self._signals = None, 0
        options: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ragkit.job_process", str(path)],
                cwd=record["cwd"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **options,
            )
        (self.folder / "stop").unlink(missing_ok=True)  # an old request

    def _cwd(self) -> str:
        """The working folder of the command: the settings' paths are relative to it."""
        cwd = self.record().get("cwd")
        return cwd if cwd and os.path.isdir(cwd) else os.getcwd()  # the project may have been moved

    @property
    def log_path(self) -> Path:
        """What the command said; one that goes on with the run adds to it."""
        return self.folder / "log.txt"

    # ---- how it stands ----

    def record(self) -> dict[str, Any]:
        """The content of `job.json`; empty for a run that was not started as a job."""
        try:
            record = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
            return record if isinstance(record, dict) else {}
        except (OSError, ValueError):
            return {}

    @property
    def alive(self) -> bool:
        """Whether its process is there."""
        return bool(self._started() or self._roots(self.record()))

    def _started(self) -> list[int]:
        """The process that was started here, as far as it lives."""
        return [] if self._process is None or self._process.poll() is not None else [self._process.pid]

    def _roots(self, record: dict[str, Any]) -> list[int]:
        """The process that stands over the command, and the command's own, as far as they live."""
        if record and record.get("exit") is None and record.get("pid") is None and self._process is None:
            return [0] if time.time() - record.get("started", 0) < STARTING else []  # it has not said its number yet
        pairs = (("pid", "created"), ("child", "child_created"))
        return [record[pid] for pid, when in pairs if is_process(record.get(pid), record.get(when))]

    def pids(self) -> list[int]:
        """The numbers of all its processes."""
        psutil = require("psutil")
        # What was started here may not have said its number yet.
        found: dict[int, None] = dict.fromkeys(pid for pid in [*self._started(), *self._roots(self.record())] if pid)
        facts = self.run.state().facts if self.run.dir.is_dir() else {}
        if is_process(facts.get("pid"), facts.get("created")):
            found[facts["pid"]] = None
        for pid in list(found):
            with suppress(psutil.Error):
                found.update(dict.fromkeys(child.pid for child in psutil.Process(pid).children(recursive=True)))
        return list(found)

    def status(self) -> RunState:
        """How the run stands, as `Run.state`, and also "starting" (nothing is trained yet) and "ending" (scoring)."""
        state = state_of(self.run.dir, self.events)
        alive, record = self.alive, self.record()
        there = state.name != "missing"
        self._seen = self._seen or there
        if not there and self._seen:
            return state
        if alive:
            name = "running" if state.name == "running" else "starting"
            if state.name in ("finished", "stopped", "failed") and _is_of(state, record):
                name = "ending"
            return _as(state, name)
        if not record or state.name == "running":  # another's training; or its guardian alone was killed
            return state
        if record.get("exit") == 0:
            return state
        own = _is_of(state, record)
        if not own and _began_after(state.facts, record):
            return state  # somebody else has gone on with the run since
        if (own and state.name == "stopped") or (self.folder / "stop").exists():
            return _as(state, "stopped")
        if record.get("exit") is None:
            # The process over the command cannot tell, but the training itself may have (a full disk).
            return state if own and state.name == "failed" else _as(state, "interrupted")
        said = last_lines(self.log_path, 200, int(record.get("log_start") or 0))
        return _as(state, *why(int(record["exit"]), state.error if own else None, said))

    def log(self, lines: int = 20) -> list[str]:
        """The last lines of what the command said."""
        return last_lines(self.log_path, lines)

    # ---- stop ----

    def stop(self) -> None:
        """Asks it to end: the training with a checkpoint after its step, anything before or after it at once.

        Call it again and again while the job lives: where a signal did not help, it is given a stronger one.
        """
        if not self.alive:
            if self.status().name == "running":
                self.run.request_stop()
            return
        status = self.status()
        if status.name == "running" or (status.name == "starting" and self.run.config_path.is_file()):
            # A resumed training forgets requests that were there before it.
            if not self.run.stop_requested:
                self.run.request_stop()
            return
        trained = state_of(self.run.dir, self.events)
        if trained.name == "stopped" and _is_of(trained, self.record()):
            return  # it has obeyed, and is about to end
        with suppress(OSError):
            (self.folder / "stop").touch()
        if self._asked is not None and time.monotonic() - self._asked < GRACE:
            return
        self._asked = time.monotonic()
        self._signal((signal.SIGINT, signal.SIGTERM)[self._signals] if self._signals < 2 else _KILL)
        self._signals += 1

    def kill(self) -> None:
        """Ends all its processes at once; what was trained since the last checkpoint is lost."""
        pids = self.pids()
        self._send(pids, _KILL)
        deadline = time.monotonic() + GRACE  # a process that holds much memory takes a moment to go
        # Its last thread lets go of the run, which may be a moment after it counts as ended.
        while (any(is_process(pid, None) for pid in pids) or is_held(self.run.dir)) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _signal(self, number: int) -> None:
        record = self.record()
        pids = self.pids()
        # torchrun passes the signal on to its processes itself, and waits for them.
        if number != _KILL and record.get("child") in pids:
            pids = [record["child"]]
        self._send(pids, number)

    @staticmethod
    def _send(pids: Iterable[int], number: int) -> None:
        for pid in pids:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for its end; False if it still lives after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.alive:
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True


_KILL: int = getattr(signal, "SIGKILL", signal.SIGTERM)


def _reserve(root: Path, kind: str, name: str | None) -> Path:
    """Makes the folder of a job, and returns that of its run, which is still to be made."""
    root.mkdir(parents=True, exist_ok=True)
    if name is not None:
        path = root / check_name(name)
        job = path.with_name(f"{name}.job")
        if path.exists():
            raise RunError(
                f'there is a run "{path}" already; choose another name (or leave name empty), or go on with that run: '
                f'RunPanel.attach("{path}")'
            )
        if job.exists():  # of a run that was deleted, or never came so far
            if Job(path).alive:
                raise RunError(f'a run "{path}" is being started already; watch it with RunPanel.attach("{path}")')
            shutil.rmtree(job)
        job.mkdir()
        return path
    stem = f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1, 10_000):
        path = root / (stem if number == 1 else f"{stem}-{number}")
        if path.exists():
            continue
        with suppress(FileExistsError):
            path.with_name(f"{path.name}.job").mkdir()
            return path
    raise RunError(f'"{root}" holds too many runs named {stem}')


def _began_after(facts: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether a training began after a process was started."""
    return float(facts.get("began") or 0.0) >= float(record.get("started") or 0.0)


def _is_of(state: RunState, record: dict[str, Any]) -> bool:
    """Whether the state is of this process's training, not of one before, nor of one elsewhere since."""
    same = state.facts.get("job", "") == record.get("token", "")  # neither is there in files of an older ragkit
    return same and _began_after(state.facts, record)


def _as(state: RunState, name: str, error: str | None = None) -> RunState:
    """The state under another name."""
    return RunState(name, state.step, state.total, error, state.facts)
