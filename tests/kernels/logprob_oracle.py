"""The definition of `token_logprobs` in float64, and inputs for it."""

from __future__ import annotations

import torch

PLAIN = {"logit_scale": 1.0, "softcap": None, "temperature": 1.0}
FULL = {"logit_scale": 0.7, "softcap": 5.0, "temperature": 1.3}


def naive(hidden, weight, targets, bias=None, logit_scale=1.0, softcap=None, temperature=1.0):
    """The definition, word by word, in float64; 0 for targets below 0."""
    logits = hidden.double() @ weight.double().T
    logits = (logits + (0 if bias is None else bias.double())) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    picked = (logits / temperature).log_softmax(-1)[torch.arange(len(targets)), targets.clamp(min=0)]
    return torch.where(targets < 0, 0.0, picked)


def inputs(rows, dim, vocabulary, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(vocabulary, dim, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), targets, bias.to(dtype)
