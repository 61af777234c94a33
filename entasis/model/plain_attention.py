"""Causal attention as matrix products around a softmax, a block of queries at a time.

torch's fused attention saves memory. Its backward pass on a CPU takes several times as long as the products it is made
of, and the compiler's loops around a softmax take several times as long as torch's own kernel (docs/speed.md): hence the
products and torch's softmax, called from here. A block of queries meets no key behind its last query, which leaves out
nearly half of the work in a long sequence.
"""

from __future__ import annotations

from typing import Any

import torch

_QUERIES = 128
"""Queries at a time. Fewer leave out more of the masked half and make poorer matrix products."""


def plain_attention(
    q_BGRTK: torch.Tensor, k_BGSK: torch.Tensor, v_BGSK: torch.Tensor, mask_BTS: torch.Tensor | None
) -> torch.Tensor:
    """Σ softmax(q · k) v, [B, G, R, T, K]: the R heads of each of G groups share its keys and values.

    The queries, already scaled, are the last T of S positions. `mask_BTS` is True where attention is allowed, and
    nowhere beyond what is causal; left out, it is causal. The softmax is computed in fp32 at least.
    """
    y_BGRTK: torch.Tensor = _PlainAttention.apply(q_BGRTK, k_BGSK, v_BGSK, mask_BTS)
    return y_BGRTK


class _PlainAttention(torch.autograd.Function):
    """Keeps the attention weights of each block for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        # Compiled for a CPU this is one operator that the compiler does not see into.
        opaque = torch.compiler.is_compiling() and q.device.type == "cpu"
        y, *weights = (_opaque_forward if opaque else _forward)(q, k, v, mask)
        ctx.save_for_backward(q, k, v, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *weights = ctx.saved_tensors
        opaque = torch.compiler.is_compiling() and q.device.type == "cpu"
        dq, dk, dv = (_opaque_backward if opaque else _backward)(grads[0].contiguous(), q, k, v, weights)
        return dq, dk, dv, None


def _blocks(T: int, S: int) -> list[tuple[slice, int]]:
    """Each block's queries, and how many keys its last query sees."""
    return [(slice(t, min(T, t + _QUERIES)), S - T + min(T, t + _QUERIES)) for t in range(0, T, _QUERIES)]


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> list[torch.Tensor]:
    """The output, and each block's attention weights [B · G · R, queries, keys]."""
    q_NTK, k_NSK, v_NSK = _by_head(q, k, v)
    outputs, weights = [], []
    for rows, keys in _blocks(q_NTK.shape[1], k_NSK.shape[1]):
        scores = q_NTK[:, rows] @ k_NSK[:, :keys].transpose(1, 2)
        n = scores.shape[1]
        if mask is not None:
            hidden = ~mask[:, None, rows, :keys]
            scores.view(len(q), -1, n, keys).masked_fill_(hidden, float("-inf"))
        elif n > 1:
            # Of the causal mask only the last corner hides anything.
            scores[..., keys - n :] += scores.new_full((n, n), float("-inf")).triu_(1)
        # torch computes the softmax of bf16 in fp32 and rounds once. A dtype that is named is left alone by autocast.
        weights.append(scores.softmax(-1, dtype=scores.dtype))
        outputs.append(weights[-1] @ v_NSK[:, :keys])
    return [torch.cat(outputs, 1).view(q.shape), *weights]


def _backward(
    dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The gradients of q, k and v; those of keys and values are summed over blocks and heads in fp32 at least."""
    q_NTK, k_NSK, v_NSK = _by_head(q, k, v)
    dy_NTK, dq_NTK = dy.reshape(q_NTK.shape), torch.empty_like(q_NTK)
    wide = torch.promote_types(k.dtype, torch.float32)
    dk, dv = (torch.zeros(k.shape, dtype=wide, device=k.device) for _ in range(2))

    def add(total: torch.Tensor, keys: int, part_NsK: torch.Tensor) -> None:
        total[:, :, :keys] += part_NsK.view(*q.shape[:3], keys, -1).sum(2, dtype=wide)

    for p, (rows, keys) in zip(weights, _blocks(q_NTK.shape[1], k_NSK.shape[1]), strict=True):
        dp = dy_NTK[:, rows] @ v_NSK[:, :keys].transpose(1, 2)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dq_NTK[:, rows] = ds @ k_NSK[:, :keys]
        add(dk, keys, (q_NTK[:, rows].transpose(1, 2) @ ds).transpose(1, 2).contiguous())
        add(dv, keys, p.transpose(1, 2) @ dy_NTK[:, rows])
    return [dq_NTK.view(q.shape), dk.to(k.dtype), dv.to(v.dtype)]


def _by_head(
    q_BGRTK: torch.Tensor, k_BGSK: torch.Tensor, v_BGSK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All with one leading dimension, keys and values once for every head that reads them."""
    R = q_BGRTK.shape[2]
    if R > 1:
        k_BGSK, v_BGSK = (x.unsqueeze(2).expand(-1, -1, R, -1, -1) for x in (k_BGSK, v_BGSK))
    return q_BGRTK.flatten(0, 2), k_BGSK.flatten(0, -3), v_BGSK.flatten(0, -3)


# torch keeps compiled code on disk by the operators' names: one whose outputs get other shapes needs another name.
_opaque_forward = torch.library.custom_op("entasis::plain_attention", _forward, mutates_args=())
_opaque_backward = torch.library.custom_op("entasis::plain_attention_backward", _backward, mutates_args=())


@_opaque_forward.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    blocks = _blocks(q.shape[3], k.shape[2])
    return [
        torch.empty_like(q),
        *(q.new_empty(q.shape[:3].numel(), rows.stop - rows.start, keys) for rows, keys in blocks),
    ]


@_opaque_backward.register_fake
def _(
    dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: list[torch.Tensor]
) -> list[torch.Tensor]:
    return [torch.empty_like(x) for x in (q, k, v)]
