"""LM scores on disk: a pair that a language model has scored once is never scored by it again."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import struct
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ragkit.files import exclusive

VERSION = "1"  # of the file's layout and of what a score means
AT_ONCE = 500  # keys of one query; sqlite takes 999 in its older versions
WAIT_SECONDS = 60  # for another process that writes


def pair_key(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> bytes:
    """16 bytes that stand for a prompt and a response, by their tokens.

    Template, chat template, passage and tokenizer are in the tokens, so that they need no key of their own.
    """
    tokens = array("q", [len(prompt_ids), *prompt_ids, *response_ids])
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds the folder's lock: one process at a time opens or renames a file."""
    with open(path.with_name(".lock"), "a") as handle, exclusive(handle.fileno()):
        yield


def _crc(key: bytes, total: float, tokens: int) -> int:
    return zlib.crc32(key + struct.pack("<dq", total, tokens))


class ScoreCache:
    """The scores of one language model, in one sqlite file that several processes may use at once.

    What is put in stays, whatever happens to the process after. A file that is damaged, or that belongs to another
    model, is set aside under another name, with a line that says so, and a new one is begun; where no file can be
    used at all (a read-only folder, a full disk), scoring goes on without, and a line says that too.

    Args:
        folder: Folder of the files; made if it is missing.
        lm: Digest of the language model (`ragkit.rag.lm_digest.lm_digest`).
        say: Called with what the user should know.

    Attributes:
        path: The file: `<lm>.sqlite`.
        read: Scores found so far.
        written: Scores put in so far.
    """

    def __init__(self, folder: str | Path, lm: str, say: Callable[[str], None] = print) -> None:
        self.path, self.lm, self._say = Path(folder) / f"{lm}.sqlite", lm, say
        self.read = self.written = 0
        self._file: sqlite3.Connection | None = None
        self._open()

    def __enter__(self) -> ScoreCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, tuple[float, int]]:
        """(sum of the log-probabilities in nats, number of tokens) of those keys that are there."""
        found: dict[bytes, tuple[float, int]] = {}
        if self._file is None:
            return found
        try:
            for start in range(0, len(keys), AT_ONCE):
                part = list(keys[start : start + AT_ONCE])
                marks = ",".join("?" * len(part))
                rows = self._file.execute(f"SELECT key, total, tokens, crc FROM scores WHERE key IN ({marks})", part)
                for key, total, tokens, crc in rows:
                    if crc != _crc(key, total, tokens):
                        raise sqlite3.DatabaseError("a score does not fit its checksum")
                    found[key] = (total, tokens)
        except sqlite3.OperationalError as error:  # locked, or the disk does not answer
            self._give_up(error)
            return {}
        except (sqlite3.DatabaseError, struct.error, TypeError) as error:
            self._file.close()
            self._file = None
            with _alone(self.path):
                self._set_aside(str(error))
            self._open()
            return {}
        self.read += len(found)
        return found

    def put(self, keys: Sequence[bytes], totals: Sequence[float], tokens: Sequence[int]) -> None:
        """Keeps scores; they are on disk when this returns, all of them or none."""
        if self._file is None:
            return
        rows = [(k, float(t), int(n), _crc(k, t, n)) for k, t, n in zip(keys, totals, tokens, strict=True)]
        try:
            with self._file:
                self._file.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?)", rows)
            self.written += len(rows)
        except sqlite3.Error as error:
            self._give_up(error)

    def __len__(self) -> int:
        return self._file.execute("SELECT COUNT(*) FROM scores").fetchone()[0] if self._file is not None else 0

    def close(self) -> None:
        """Closes the file; what is in it stays."""
        if self._file is not None:
            with suppress(sqlite3.Error):
                self._file.close()
            self._file = None

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self.path):  # or two processes would set the same file aside, one of them a good new one
                problem = self._connect()
                if problem:
                    self._set_aside(problem)
                    problem = self._connect()
            if problem:
                self._say(f"{self.path}: no LM scores are kept ({problem})")
        except (OSError, sqlite3.Error) as error:
            self._file = None
            self._say(f"{self.path}: no LM scores are kept ({error})")

    def _connect(self) -> str:
        """Opens and checks the file, or begins one; returns what is wrong with it, if anything."""
        file = sqlite3.connect(self.path, timeout=WAIT_SECONDS, check_same_thread=False)
        try:
            file.execute("PRAGMA journal_mode=WAL")  # readers and a writer at once; whole after a kill
            file.execute("PRAGMA synchronous=NORMAL")
            tables = {name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables:
                with file:
                    file.execute("CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT)")
                    file.execute(
                        "CREATE TABLE scores (key BLOB PRIMARY KEY, total REAL, tokens INTEGER, crc INTEGER) "
                        "WITHOUT ROWID"
                    )
                    file.executemany("INSERT INTO about VALUES (?, ?)", [("version", VERSION), ("lm", self.lm)])
            about = dict(file.execute("SELECT name, value FROM about"))
            if about.get("lm") != self.lm or about.get("version") != VERSION:
                problem = f"it holds the scores of another language model ({about.get('lm')})"
            else:
                (verdict,) = file.execute("PRAGMA quick_check(1)").fetchone()
                problem = "" if verdict == "ok" else verdict
        except sqlite3.OperationalError:  # locked, read-only, no space: the file may be whole
            file.close()
            raise
        except sqlite3.DatabaseError as error:
            problem = str(error)
        if problem:
            file.close()
        else:
            self._file = file
        return problem

    def _set_aside(self, problem: str) -> None:
        """Gives the file another name, so that a person can look at it and nobody reads it."""
        aside = self.path.with_name(f"{self.path.stem}.damaged-{time.time_ns()}.sqlite")
        for suffix in ("-wal", "-shm", ""):  # the first two go first: they would be taken for those of the new file
            with suppress(FileNotFoundError):
                os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
        self._say(
            f"{self.path} cannot be used ({problem}); it was renamed to {aside.name}, and its scores are made anew"
        )

    def _give_up(self, error: Exception) -> None:
        self._say(f"{self.path}: from here on no LM scores are kept ({error})")
        self.close()
