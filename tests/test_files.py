"""Atomic writes: the old content stays until the new one is whole."""

from __future__ import annotations

import os
import stat

import pytest

from ragkit.files import atomic_dir, atomic_write_json, atomic_write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = atomic_write_json(tmp_path / "a" / "x.json", {"n": 1})
    with pytest.raises(ValueError):
        atomic_write_json(path, {"n": float("nan")})
    assert path.read_text(encoding="utf-8") == '{\n "n": 1\n}\n'
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path):
    folder = tmp_path / "system"
    with atomic_dir(folder) as new:
        (new / "a").write_text("1", encoding="utf-8")
    with pytest.raises(RuntimeError), atomic_dir(folder) as new:
        (new / "a").write_text("2", encoding="utf-8")
        raise RuntimeError
    assert (folder / "a").read_text(encoding="utf-8") == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["system"]
    with atomic_dir(folder) as new:
        (new / "b").write_text("3", encoding="utf-8")
    assert [p.name for p in folder.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["system"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    folder = tmp_path / "system"
    with atomic_dir(folder) as new:
        (new / "a").write_text("1", encoding="utf-8")
    replace = os.replace

    def failing(source, target):
        if str(source).endswith(".tmp") and target == folder:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(KeyboardInterrupt), atomic_dir(folder) as new:
        (new / "a").write_text("2", encoding="utf-8")
    assert (folder / "a").read_text(encoding="utf-8") == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["system"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX rights")
def test_rights_are_those_of_ordinary_files(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain.txt").write_text("", encoding="utf-8")
    with atomic_dir(tmp_path / "made"):
        pass
    atomic_write_text(tmp_path / "made.txt", "")

    def mode(name: str) -> int:
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    assert mode("made") == mode("plain") and mode("made.txt") == mode("plain.txt")
