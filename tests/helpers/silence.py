"""That nothing is warned about."""

from __future__ import annotations

import warnings
from contextlib import contextmanager


@contextmanager
def no_warning():
    """Every warning is an error, but for those of what earlier tests left to be collected."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)
        yield
