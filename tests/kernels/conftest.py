"""Shared by the kernels' tests on a GPU."""

from __future__ import annotations

import pytest
import torch
from case_tools import fill_new_memory


@pytest.fixture
def new_memory_is_nan():
    """What a kernel forgets to write is NaN."""
    fill_new_memory()
    yield
    torch.use_deterministic_algorithms(False)
