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
poor matrix products. Measured 0.55 and 0.9 of the time of 64 MB at vocabularies of 8192 and 50304
(benchmarks/chunks.py)."""
_ROWS_BF16 = 512
"""Units for bf16 products want more rows; 48 ms instead of 52 with 128, and 153 instead of 217, at the same
vocabularies. Compiled, one graph over all logits is faster still (38 and 124 ms) and is made where they fit."""


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
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
    if at_once is None and device == "cpu":
        if dtype != torch.bfloat16:
            rows = min(rows, max(_ROWS, _IN_CACHE // vocabulary))
        elif not (torch.compiler.is_compiling() and len(x_ND) <= rows):
            rows = min(rows, _ROWS_BF16)
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
        wanted = list(ctx.needs_input_grad[:3])
        # On a CPU the chunks are one opaque operator: compiled, their many small steps would be taken apart and would
        # leave the caches, and compiling would take the longer the more chunks there are.
        by_chunks = _opaque if x_ND.device.type == "cpu" else _by_chunks
        with torch.autocast(x_ND.device.type, enabled=False):
            total, *gradients = by_chunks(
                x_ND, weight_VD, bias_V, targets_N, logit_scale, rows, dtype, wanted
            )
        ctx.save_for_backward(*gradients)
        ctx.wanted = wanted
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = iter(d * grads[0].to(d.dtype) for d in ctx.saved_tensors)
        dx_ND, dw_VD, db_V = (next(found) if wanted else None for wanted in ctx.wanted)
        return dx_ND, dw_VD, db_V, None, None, None, None


def _by_chunks(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    logit_scale: float,
    rows: int,
    dtype: torch.dtype,
    wanted: list[bool],
) -> list[torch.Tensor]:
    """The loss and those of its gradients by x, weight and bias that are `wanted`; products in `dtype`."""
    w_VD = weight_VD.to(dtype)
    total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
    # Of x every row is written once; the others are sums.
    dx_ND = torch.empty_like(x_ND) if wanted[0] else None
    dw_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted[1] else None
    db_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and wanted[2] else None
    for i in range(0, len(x_ND), rows):
        x_nD, targets_n = x_ND[i : i + rows].to(dtype), targets_N[i : i + rows]
        logits_nV = (x_nD @ w_VD.T).float()
        if bias_V is not None:
            logits_nV = logits_nV + bias_V.float()
        if logit_scale != 1.0:
            logits_nV = logits_nV * logit_scale
        p_nV = logits_nV.softmax(-1)
        # log Σ exp, from the largest logit and its probability: one pass with exponentials does for loss and gradient.
        log_z_n1 = logits_nV.amax(-1, keepdim=True) - p_nV.amax(-1, keepdim=True).log()
        # What does not count is left out of the narrow factors of each product, not of the wide one.
        counts_n1 = (targets_n != -100)[:, None].to(dtype)
        index_n1 = targets_n.clamp(min=0)[:, None]
        total = total + ((log_z_n1 - logits_nV.gather(1, index_n1)) * counts_n1.float()).sum()
        if not any(wanted):
            continue
        d_nV = p_nV.scatter_add_(1, index_n1, torch.full_like(index_n1, -1, dtype=p_nV.dtype))
        if db_V is not None:
            db_V += (d_nV * counts_n1.float()).sum(0)
        d_nV = d_nV.to(dtype)
        if dx_ND is not None:
            dx_ND[i : i + rows] = (d_nV @ w_VD) * counts_n1
        if dw_VD is not None and dtype == torch.float32:
            dw_VD.addmm_(d_nV.T, x_nD * counts_n1)
        elif dw_VD is not None:
            dw_VD += d_nV.T @ (x_nD * counts_n1)
    found = ((dx_ND, x_ND), (dw_VD, weight_VD), (db_V, bias_V))
    gradients = [d.to(p.dtype) for d, p in found if d is not None and p is not None]
    if logit_scale != 1.0:
        gradients = [d * logit_scale for d in gradients]
    return [total, *gradients]


_opaque = torch.library.custom_op("entasis::chunked_nll", _by_chunks, mutates_args=())


@_opaque.register_fake
def _(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    logit_scale: float,
    rows: int,
    dtype: torch.dtype,
    wanted: list[bool],
) -> list[torch.Tensor]:
    inputs = zip((x_ND, weight_VD, bias_V), wanted, strict=True)
    gradients = [torch.empty_like(p) for p, wants in inputs if wants and p is not None]
    return [x_ND.new_empty((), dtype=torch.float32), *gradients]
