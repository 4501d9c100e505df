"""The one error of federated training."""

from __future__ import annotations


class FederatedError(RuntimeError):
    """A federated training that cannot start or go on; the message names the client, round or tensor and the fix."""
