"""Muon in float32: momentum whose matrices are orthogonalised before the step.

torch.optim.Muon works in bfloat16, which a CPU without bfloat16 units multiplies fifty times slower.
Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration: pushes the singular values of each matrix towards 1. x: [n, rows, columns]."""
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """For the matrices of the hidden layers; embeddings, biases and norms belong to AdamW.

    Args:
        params: Two-dimensional parameters.
        lr: Step size.
        momentum: Decay of the running gradient (Nesterov).
    """

    def __init__(self, params: Any, lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; matrices of one shape are orthogonalised together."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                running = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                shapes[p.shape].append((p, p.grad.lerp(running, group["momentum"])))
            for shape, pairs in shapes.items():
                updates = orthogonalise(torch.stack([u for _, u in pairs]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.add_(update, alpha=-scale)
