"""The cache of LM scores: what is put in stays, and nothing else is ever read."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from ragkit.tuning.score_cache import ScoreCache, pair_key

KEYS = [pair_key([1, 2, n], [3]) for n in range(300)]
TOTALS = [-n / 7 for n in range(300)]
TOKENS = [1 + n % 5 for n in range(300)]
WANTED = {key: (total, tokens) for key, total, tokens in zip(KEYS, TOTALS, TOKENS, strict=True)}


@pytest.fixture
def said():
    return []


@pytest.fixture
def filled(tmp_path, said):
    """A closed cache with 300 scores."""
    with ScoreCache(tmp_path, "model-a", said.append) as cache:
        cache.put(KEYS, TOTALS, TOKENS)
    return cache.path


def test_what_is_put_in_comes_out_exactly(filled, tmp_path, said):
    with ScoreCache(tmp_path, "model-a", said.append) as cache:
        assert cache.get([*KEYS, pair_key([9], [9])]) == WANTED  # float64, to the last bit
        assert (cache.read, cache.written, len(cache)) == (300, 0, 300)
        assert cache.get([]) == {}
        cache.put(KEYS[:1], [-5.0], [1])  # the last one counts
        assert cache.get(KEYS[:1]) == {KEYS[0]: (-5.0, 1)}
    assert said == []


def test_more_keys_than_one_query_takes(tmp_path, said):
    keys = [pair_key([n], [n]) for n in range(2100)]
    with ScoreCache(tmp_path, "m", said.append) as cache:
        cache.put(keys, range(2100), [1] * 2100)
        found = cache.get(keys)
    assert [found[key][0] for key in keys] == list(range(2100))


def test_the_key_tells_prompt_and_response_apart():
    pairs = [([1, 2], [3]), ([1], [2, 3]), ([1, 2, 3], []), ([1, 2], [4]), ([1, 2, 0], [3]), ([1, 2], [3, 0])]
    assert len({pair_key(*pair) for pair in pairs}) == len(pairs)
    assert pair_key((1, 2), (3,)) == pair_key([1, 2], [3])


def test_another_model_has_another_file(filled, tmp_path, said):
    with ScoreCache(tmp_path, "model-b", said.append) as cache:
        assert cache.get(KEYS) == {} and cache.path != filled
    assert said == []


def test_a_file_of_another_model_under_this_name_is_not_read(filled, tmp_path, said):
    os.replace(filled, tmp_path / "model-b.sqlite")
    with ScoreCache(tmp_path, "model-b", said.append) as cache:
        assert cache.get(KEYS) == {}
        cache.put(KEYS[:2], TOTALS[:2], TOKENS[:2])
    assert len(said) == 1 and "of another language model (model-a)" in said[0] and "renamed to" in said[0]
    (aside,) = tmp_path.glob("model-b.damaged-*.sqlite")
    assert sqlite3.connect(aside).execute("SELECT COUNT(*) FROM scores").fetchone() == (300,)
    with ScoreCache(tmp_path, "model-b", said.append) as cache:
        assert len(cache) == 2
    assert len(said) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:50],
        lambda data: b"",
        lambda data: b"this is no database at all, but a longer text" * 10,
        lambda data: data[:4096] + bytes(len(data) - 4096),
    ],
    ids=["half", "header", "empty", "text", "zeros"],
)
def test_a_damaged_file_is_set_aside_and_begun_anew(filled, tmp_path, said, damage):
    data = filled.read_bytes()
    filled.write_bytes(damage(data))
    with ScoreCache(tmp_path, "model-a", said.append) as cache:
        assert cache.get(KEYS) == {}
        cache.put(KEYS, TOTALS, TOKENS)
        assert cache.get(KEYS) == WANTED
    if damage(data):  # an empty file is a new one
        assert len(said) == 1 and str(filled) in said[0] and "made anew" in said[0]
        assert len(list(tmp_path.glob("*.damaged-*"))) == 1


def test_every_flipped_byte_is_noticed_or_harmless(filled, tmp_path, said):
    """Whatever byte of the file changes, no wrong score is read."""
    data = filled.read_bytes()
    for place in range(0, len(data), 331):
        changed = bytearray(data)
        changed[place] ^= 0xFF
        filled.write_bytes(bytes(changed))
        with ScoreCache(tmp_path, "model-a", said.append) as cache:
            assert cache.get(KEYS).items() <= WANTED.items()
    assert said  # some were noticed


def test_a_score_that_was_changed_in_the_file_is_not_read(filled, tmp_path, said):
    with sqlite3.connect(filled) as file:
        file.execute("UPDATE scores SET total = -1.25 WHERE key = ?", [KEYS[7]])
    file.close()
    with ScoreCache(tmp_path, "model-a", said.append) as cache:
        assert cache.get(KEYS) == {}
        cache.put(KEYS[:1], TOTALS[:1], TOKENS[:1])
        assert cache.get(KEYS[:1]) == {KEYS[0]: WANTED[KEYS[0]]}
    assert len(said) == 1 and "checksum" in said[0]


def test_without_a_usable_folder_scoring_goes_on(tmp_path, said):
    (tmp_path / "taken").write_text("a file where a folder should be")
    with ScoreCache(tmp_path / "taken", "m", said.append) as cache:
        cache.put(KEYS, TOTALS, TOKENS)
        assert cache.get(KEYS) == {} and len(cache) == 0
    assert len(said) == 1 and "no LM scores are kept" in said[0]


def test_a_full_disk_is_said_once(tmp_path, said):
    with ScoreCache(tmp_path, "m", said.append) as cache:
        cache.put(KEYS[:1], TOTALS[:1], TOKENS[:1])
        cache._file.execute("PRAGMA max_page_count = 1")
        for _ in range(3):
            cache.put([pair_key([n], [n, n]) for n in range(20000)], range(20000), [1] * 20000)
    assert len(said) == 1 and "from here on no LM scores are kept" in said[0]
    with ScoreCache(tmp_path, "m", said.append) as cache:
        assert cache.get(KEYS[:1]) == {KEYS[0]: WANTED[KEYS[0]]} and len(cache) == 1


WRITER = """
import sys
from ragkit.tuning.score_cache import ScoreCache, pair_key
folder, first = sys.argv[1], int(sys.argv[2])
with ScoreCache(folder, "m") as cache:
    for n in range(first, first + 200):
        cache.put([pair_key([n], [n])], [float(n)], [1])
        print(n, flush=True)
    sys.stdin.readline()
"""


def test_several_processes_share_a_file_and_a_kill_loses_nothing(tmp_path, said):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(first)],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for first in (0, 100)  # half of the scores of each are the other's too
    ]
    deadline = time.monotonic() + 300
    done = [[] for _ in writers]
    for lines, writer, wanted in zip(done, writers, (200, 50), strict=True):
        while len(lines) < wanted:
            line = writer.stdout.readline()
            assert line and time.monotonic() < deadline, writer.stderr.read()
            lines.append(int(line))
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        lines, _ = writer.communicate()
        done[writers.index(writer)] += [int(line) for line in lines.split()]
    with ScoreCache(tmp_path, "m", said.append) as cache:
        acknowledged = sorted({n for lines in done for n in lines})
        found = cache.get([pair_key([n], [n]) for n in acknowledged])
        assert [found[pair_key([n], [n])] for n in acknowledged] == [(float(n), 1) for n in acknowledged]
    assert said == []
