"""Atomic writes: a reader sees the old content or the new one, never a half."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


def _as_others(path: str | Path, mode: int) -> None:
    """Gives a temporary file or folder the rights that an ordinary one would have (tempfile makes them private)."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, mode & ~mask)


@contextmanager
def exclusive(handle: int) -> Iterator[None]:
    """Holds an open file for this process alone, against others that ask the same; a killed process lets go of it.

    Where the system (Windows) or the file system (some network drives) has no `flock`, nothing is held.
    """
    held = False
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
        held = True
    try:
        yield
    finally:
        if held:
            fcntl.flock(handle, fcntl.LOCK_UN)


def try_lock(handle: int) -> bool | None:
    """Takes the lock of an open file without waiting; it is let go of when the file is closed or the process ends.

    Returns:
        Whether it was free; None where the system or the file system has no such locks.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_locked(path: str | Path) -> bool | None:
    """Whether somebody holds the lock of a file; False where there is no file, None where there are no such locks."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that look do not take each other for a holder
    except ImportError:
        return None
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write bytes to, that stands at `path` once the block has ended without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _as_others(temporary, 0o666)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def atomic_write_text(path: str | Path, text: str) -> Path:
    """Writes `text` (UTF-8) to `path` through a temporary file in the same folder and a rename."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))
    return Path(path)


def atomic_write_json(path: str | Path, value: Any) -> Path:
    """Writes `value` as indented JSON (UTF-8, strict: NaN is refused) atomically."""
    return atomic_write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary folder that replaces `path` when the block ends without an error.

    An existing folder at `path` stays whole until the new one is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        _as_others(temporary, 0o777)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
            os.replace(path, old / "old")
            try:
                os.replace(temporary, path)
            except BaseException:
                os.replace(old / "old", path)  # never both gone
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
