"""`python -m ragkit COMMAND [config.yaml] [key=value ...]`, and the same under torchrun."""

from __future__ import annotations

from ragkit.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
