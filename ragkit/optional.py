"""Optional libraries: imported where they are used, with one message that says what to install."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

NEEDS_PYTHON = {"federated": (3, 11)}  # extras that are empty on an older Python: to install them would change nothing


def require(module: str, extra: str | None = None, package: str | None = None) -> ModuleType:
    """Imports an optional library, or says how to get it.

    Args:
        module: Name to import, for example `"qdrant_client"`.
        extra: The ragkit extra that brings it (`pip install "ragkit[extra]"`).
        package: Name on the package index where it differs from `module`.

    Returns:
        The imported module.

    Raises:
        ImportError: The library is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise  # the library is there, something that it needs is not
        least = NEEDS_PYTHON.get(extra or "")
        if least is not None and sys.version_info < least:
            have, need = (".".join(map(str, version[:2])) for version in (sys.version_info, least))
            raise ImportError(
                f"this needs the library {module}, which needs Python {need} or later; this is Python {have}. Make an "
                f'environment with a newer Python and install "ragkit[{extra}]" there'
            ) from error
        wanted = f'"ragkit[{extra}]"' if extra else (package or module)
        raise ImportError(f"this needs the library {module}; install it with: pip install {wanted}") from error
