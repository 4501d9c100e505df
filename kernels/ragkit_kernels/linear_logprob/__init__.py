"""Log-probabilities of given tokens, or of whole sequences, under a linear language-model head."""

from __future__ import annotations

from ragkit_kernels.linear_logprob.op import token_logprobs
from ragkit_kernels.linear_logprob.reference import token_logprobs_reference
from ragkit_kernels.linear_logprob.sequence import sequence_logprob

__all__ = ["sequence_logprob", "token_logprobs", "token_logprobs_reference"]
