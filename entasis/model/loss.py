"""Cross-entropy summed in fp32, with at most a few megabytes of logits at a time.

The head's logits are the largest tensor of a small model with a large vocabulary. They are made for a chunk of
tokens, turned into the loss and at once into the gradients of hidden states and head, and dropped (as in Liger
Kernel, 2410.10989): each of the three matrix products is done once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

LOGITS_AT_ONCE = 1 << 24
"""Elements of logits in memory at a time: 64 MB in fp32."""
_IN_CACHE, _ROWS = 1 << 20, 128
"""On a CPU: 4 MB of logits stay in its caches between one pass over them and the next, but fewer than 128 rows make
poor matrix products. Measured 0.7 and 0.8 of the time of 64 MB at vocabularies of 8192 and 50304
(benchmarks/chunks.py; eager: compiled code makes fewer passes and would grow with the number of chunks)."""


def summed_nll(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    logit_scale: float = 1.0,
    *,
    at_once: int | None = None,
) -> torch.Tensor:
    """Σ −log p(target) in nats as an fp32 scalar; targets of -100 do not count.

    `at_once` is how many elements of logits are made at a time; left out, what suits the device.
    """
    device, vocabulary = x_ND.device.type, weight_VD.shape[0]
    rows = max(1, (at_once or LOGITS_AT_ONCE) // vocabulary)
    if at_once is None and device == "cpu" and not torch.compiler.is_compiling():
        rows = min(rows, max(_ROWS, _IN_CACHE // vocabulary))
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
    if len(x_ND) <= rows:
        logits_NV = F.linear(x_ND, weight_VD, bias_V).float() * logit_scale
        return F.cross_entropy(logits_NV, targets_N, reduction="sum")
    return _ChunkedNLL.apply(x_ND, weight_VD, bias_V, targets_N, logit_scale, rows, dtype)


class _ChunkedNLL(torch.autograd.Function):
    """The gradient for a unit output is computed in the forward pass; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        logit_scale: float,
        rows: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        wanted = any(ctx.needs_input_grad[:3])
        w_VD = weight_VD.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        dx_ND = torch.empty_like(x_ND) if wanted else None
        dw_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted else None
        db_V = torch.zeros_like(bias_V, dtype=torch.float32) if wanted and bias_V is not None else None
        with torch.autocast(x_ND.device.type, enabled=False):
            for i in range(0, len(x_ND), rows):
                x_nD, targets_n = x_ND[i : i + rows].to(dtype), targets_N[i : i + rows]
                logits_nV = (x_nD @ w_VD.T).float()
                if bias_V is not None:
                    logits_nV = logits_nV + bias_V.float()
                logits_nV = logits_nV * logit_scale
                log_z_n = logits_nV.logsumexp(-1)
                counts_n = targets_n != -100
                index_n1 = targets_n.clamp(min=0)[:, None]
                nll_n = log_z_n - logits_nV.gather(1, index_n1)[:, 0]
                total = total + torch.where(counts_n, nll_n, 0.0).sum()
                if dx_ND is not None and dw_VD is not None:
                    d_nV = (logits_nV - log_z_n[:, None]).exp()
                    d_nV = d_nV.scatter_add(1, index_n1, torch.full_like(index_n1, -1, dtype=d_nV.dtype))
                    d_nV = d_nV * (counts_n[:, None] * logit_scale)
                    if db_V is not None:
                        db_V += d_nV.sum(0)
                    d_nV = d_nV.to(dtype)
                    dx_ND[i : i + rows] = d_nV @ w_VD
                    dw_VD += (d_nV.T @ x_nD).float()
        ctx.save_for_backward(dx_ND, None if dw_VD is None else dw_VD.to(weight_VD.dtype), db_V)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx_ND, dw_VD, db_V = ctx.saved_tensors
        scaled = [None if d is None else d * grads[0].to(d.dtype) for d in (dx_ND, dw_VD, db_V)]
        return *scaled, None, None, None, None
