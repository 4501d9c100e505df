"""The choice of CPU threads."""

from __future__ import annotations

import pytest
import torch

from ragkit.threads import pick_threads, usable_cores


@pytest.fixture(autouse=True)
def restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_user_s_choice_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    assert pick_threads() == 3 == torch.get_num_threads()


def test_the_faster_number_is_set_and_no_random_number_is_drawn():
    state = torch.get_rng_state()
    best = pick_threads([1, 2])
    assert best in (1, 2) and torch.get_num_threads() == best
    assert torch.equal(torch.get_rng_state(), state)
    assert usable_cores() >= 1
