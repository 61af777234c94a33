"""Muon in the precision of the run, also on shares of a model.

`torch.optim.Muon` orthogonalises in bf16 always, which a CPU without AMX computes a hundred times slower than fp32. This
one takes the precision from the recipe and is otherwise the same, to the bit in bf16. Of a sharded model it gathers one
matrix at a time and every process orthogonalises it whole.

Matrices are taken one by one: in batches of equal shapes, or of unequal ones padded with zeros, they were no faster
(`benchmarks/muon.py`).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from entasis.train import sharding

_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with Nesterov momentum and AdamW's root mean square, orthogonalising in `dtype`."""

    def __init__(self, params: Any, *, lr: float, dtype: torch.dtype) -> None:
        super().__init__(params, lr=lr, adjust_lr_fn="match_rms_adamw")
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                velocity = state["momentum_buffer"]
                velocity.lerp_(p.grad, 1 - momentum)
                update = sharding.like(
                    orthogonalise(sharding.full(p.grad.lerp(velocity, momentum)).to(self.dtype)), p
                )
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))


def orthogonalise(x_MN: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values brought near 1 by five quintic Newton–Schulz steps (Jordan, 2024)."""
    x = x_MN.T if x_MN.shape[0] > x_MN.shape[1] else x_MN
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if x_MN.shape[0] > x_MN.shape[1] else x
