"""A trainer of this kernel that trains in a thread, so that the kernel stays free."""

from __future__ import annotations

import json
import logging
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ragkit.console import explain
from ragkit.evaluation import EvaluationResult
from ragkit.files import atomic_write_json
from ragkit.notes import Listener, listen
from ragkit.run_state import EventReader, RunState, one_line, state_of
from ragkit.runs import Run, RunError

Scores = EvaluationResult | Mapping[str, EvaluationResult]
_LIBRARIES = ("transformers", "sentence_transformers", "datasets", "peft", "huggingface_hub", "accelerate")
PREPARING = "preparing the rows that are trained on"
KEEPING = "keeping the weights, and encoding the passages anew if their encoder was trained"
_here: weakref.WeakValueDictionary[str, ThreadRun] = weakref.WeakValueDictionary()  # by run folder


class ThreadRun:
    """Trains in a thread: a `Job` for trainers whose system lives in this kernel.

    Args:
        trainer: An `LSRTrainer`, `RALTTrainer`, `GFMFinetuneTrainer` or `GFMPretrainTrainer`.
        score: Scores the system as it is now, before and after; an `EvaluationResult`, or several by name.

    Attributes:
        run: The run folder; None before the first start, where the trainer has none yet.
        result: What the training gave; None until it has ended.
        error: The error that ended it, or None.
    """

    def __init__(self, trainer: Any, score: Callable[[], Scores] | None = None) -> None:
        self.trainer, self.score = trainer, score
        self.run: Run | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self._phase = ""
        self._began = self._ended = 0.0  # the thread, in seconds of time.time()
        self._trained = False  # the training itself is done, the thread goes on
        self.events = EventReader(Path("events.jsonl"))
        self._lines: deque[str] = deque(maxlen=500)
        self._thread: threading.Thread | None = None
        if trainer.run is not None:
            self._use(trainer.run)

    def _use(self, run: Run) -> None:
        self.run = Run(run.dir.absolute())
        self.events = EventReader(self.run.events_path)
        _here[str(self.run.dir)] = self

    # ---- start and stop ----

    def start(self) -> None:
        """Trains in a new run folder.

        Raises:
            RunError: It trains already, or the folder cannot be made.
        """
        self._must_be_idle()
        config = self.trainer.config
        run = self.trainer.run
        if run is None or not run.config_path.is_file() or run.events():
            try:
                self.trainer.run = Run.create(config, config.output_dir, config.name)
            except OSError as error:
                raise RunError(
                    f"the run cannot be started: {error}. Its folder is made in output_dir ({config.output_dir}); "
                    "choose one that you may write to and that has room"
                ) from error
        self._use(self.trainer.run)
        self._go(resume=False)

    def resume(self) -> None:
        """Goes on from the last checkpoint of the trainer's run.

        Raises:
            RunError: It trains already, or its folder is gone.
        """
        self._must_be_idle()
        if self.run is None or not self.run.config_path.is_file():
            where = f' "{self.run.dir}"' if self.run is not None else ""
            raise RunError(f"there is no run folder{where} to go on with; start a new run")
        (self.trainer.run or self.run).begin_resume()  # old requests are forgotten, from now on they are obeyed
        self._go(resume=True)

    def stop(self) -> None:
        """Asks the training to save a checkpoint and end; to be called again while it goes on."""
        if self.run is None or not self.run.config_path.is_file() or self.run.stop_requested:
            return
        if self.status().name != "ending":  # there, a request would be left over for nobody
            self.run.request_stop()

    def _must_be_idle(self) -> None:
        if self.alive:
            raise RunError(f"{type(self.trainer).__name__} is training already; stop it, or wait for its end")

    @property
    def alive(self) -> bool:
        """Whether the thread goes on."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for its end; False if it goes on after `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.alive

    # ---- in the thread ----

    def _go(self, resume: bool) -> None:
        self.result, self.error = None, None
        self._began, self._trained = time.time(), False
        self._thread = threading.Thread(target=self._work, args=(resume,), name="ragkit training", daemon=True)
        self._thread.start()

    def _work(self, resume: bool) -> None:
        run = self.run
        assert run is not None
        with quiet(self._lines.append):
            try:
                self._score("before", run)
                if run.stop_requested and not resume:
                    return  # asked while it scored: nothing is trained
                self._phase = PREPARING
                self.result = self.trainer.train(resume=resume)
                if not self.result.stopped:
                    self._score("after", run)
            except BaseException as error:  # also SystemExit: in a thread it would be lost without a word
                self.error = error
                self._lines.append(f"{type(error).__name__}: {one_line(error)}")
                with suppress(OSError, RunError):
                    if run.config_path.is_file() and run.state().name in ("new", "interrupted"):
                        with run.hold() as held:  # for those who look from outside
                            held.end("failed", one_line(error))
            finally:
                self._phase, self._ended = "", time.time()
                (self.trainer.run or run).end_resume()

    def _score(self, when: str, run: Run) -> None:
        """Scores and keeps it in the run's `evaluation.json`; what was scored before the first start stays."""
        if self.score is None:
            return
        path = run.dir / "evaluation.json"
        kept: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            kept = json.loads(path.read_text(encoding="utf-8"))
        if when == "before" and kept:
            return
        self._phase = f"scoring {when} the training"
        self._lines.append(self._phase)
        found = self.score()
        if isinstance(found, Mapping):
            for name, result in found.items():
                kept.setdefault(name, {})[when] = result.to_dict()
        else:
            kept[when] = found.to_dict()
        atomic_write_json(path, kept)

    # ---- how it stands ----

    @property
    def phase(self) -> str:
        """What is done just now."""
        return KEEPING if self._trained and self._phase == PREPARING else self._phase

    def status(self) -> RunState:
        """How the run stands, as `Run.state`, and also "starting" (nothing is trained yet) and "ending" (scoring)."""
        if self.run is None:
            return RunState("new")
        alive = self.alive  # before the files: what ends in between has written them
        state = state_of(self.run.dir, self.events)
        if state.name == "missing":
            return state
        began = float(state.facts.get("began") or 0.0)
        if alive:
            self._trained = state.name in ("finished", "stopped", "failed") and began >= self._began
            ending = self._trained or self.result is not None
            name = state.name if state.name == "running" else "ending" if ending else "starting"
            return RunState(name, state.step, state.total, None, state.facts)
        if self.error is not None and began > self._ended:
            self.error = None  # somebody else has gone on with the run since
        if self.error is not None:
            return RunState("failed", state.step, state.total, self._sentence(), state.facts)
        if state.name == "new" and self._thread is not None:
            return RunState("stopped", 0, state.total, None, state.facts)
        return state

    def _sentence(self) -> str:
        assert self.error is not None
        ours = explain(self.error) if isinstance(self.error, Exception) else None
        return " ".join(ours.split()) if ours else f"{type(self.error).__name__}: {one_line(self.error)}"

    def log(self, lines: int = 20) -> list[str]:
        """The last lines that the training said."""
        return list(self._lines)[-lines:]


def of_this_kernel(run_dir: str | Path) -> ThreadRun | None:
    """The trainer of this kernel that works, or worked, on a run."""
    found = _here.get(str(Path(run_dir).absolute()))
    return found if found is not None and (found.alive or found.status().name != "missing") else None


# ---- a thread must not print ----


class _Lines(Listener):
    """Turns log records of the thread into lines."""

    def __init__(self, add: Callable[[str], None]) -> None:
        super().__init__()
        self._add = add

    def emit(self, record: logging.LogRecord) -> None:
        self._add(("note: " if record.levelno > logging.INFO else "") + record.getMessage())


@contextmanager
def quiet(add: Callable[[str], None]) -> Iterator[None]:
    """What this thread says and warns of becomes lines, instead of text under whatever cell runs just then."""
    with ExitStack() as stack:
        stack.enter_context(listen(_Lines(add)))
        stack.enter_context(_warnings_to(add))
        stack.enter_context(_silent_libraries())
        yield


_takers: dict[int, Callable[[str], None]] = {}  # who takes the warnings of a thread
_shown_before: list[Any] = []  # the `warnings.showwarning` that ours stands in for


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    add = _takers.get(threading.get_ident())
    if add is not None:
        add(f"warning: {one_line(message) if isinstance(message, Warning) else message}")
    else:
        _shown_before[0](message, category, filename, lineno, file, line)


@contextmanager
def _warnings_to(add: Callable[[str], None]) -> Iterator[None]:
    if warnings.showwarning is not _show_warning:
        _shown_before[:] = [warnings.showwarning]
        warnings.showwarning = _show_warning
    _takers[threading.get_ident()] = add
    try:
        yield
    finally:
        # Another thread's `catch_warnings` may put ours back afterwards: without takers it does what was before.
        del _takers[threading.get_ident()]
        if not _takers and warnings.showwarning is _show_warning:
            warnings.showwarning = _shown_before[0]


@contextmanager
def _silent_libraries() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in _LIBRARIES}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
