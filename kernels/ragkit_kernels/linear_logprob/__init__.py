"""Log-probabilities of given tokens under a linear language-model head."""

from __future__ import annotations

from ragkit_kernels.linear_logprob.reference import token_logprobs

__all__ = ["token_logprobs"]
