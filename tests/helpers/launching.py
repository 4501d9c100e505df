"""How tests start two processes."""

from __future__ import annotations

import sys

# torchrun finds a free port itself.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
