"""What the numba backends share."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import torch
from ragkit_kernels.relational_conv import build_layout, relational_conv
torch.set_num_threads(1)
layout = build_layout(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([0, 0]), 2, 1)
relational_conv(torch.randn(2, 1, 4), torch.randn(1, 4), layout)
print(torch.get_num_threads())
"""


@pytest.mark.slow
def test_the_first_kernel_leaves_pytorchs_threads_as_they_are():
    """In a process of its own: numba's threads start once, and would take PyTorch's number with them."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]
