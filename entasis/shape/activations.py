"""What layers keep of the forward pass for the backward pass, and which of them go under activation checkpointing.

Bytes per token of one layer, d the model width, h and g query and KV heads, k the head width, f the FFN width, b bytes
of a matrix product's operand (4 in fp32, 2 in bf16) and s the keys that a query's block sees on average (`_keys`):

    norm (RMS; LayerNorm keeps half)    8·d          attention, fused    b·k·(3h + 2g) + 4h
    input of query, key, value          b·d, fp32    attention, plain    b·k·(2h + 2g) + b·s·h
                                        3b·d, bf16   SwiGLU              b·4f
    input of gate and up, up alone      b·d, fp32    GELU                b·2f
                                        b·d each, bf16

That is what eager torch keeps on a CPU, exactly so for rotary positions with norms in front. Compiled code was measured
to keep 0.70 to 0.83 of it; CUDA's fused norms should keep less too, which was not measured. Not counted: embedding,
loss, weights and their bf16 copies.

A layer under activation checkpointing is computed once more in the backward pass and keeps its input (4·d). While its
backward pass runs it needs everything once more, together with what the layers *before* it keep; those after it are done. So checkpointing the last layer frees nothing at the
moment that counts, and of two equal layers the earlier is the better choice. The gradients inside the layer that is at
work come on top: measured, up to 0.4 of what that layer keeps.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

from entasis.errors import UserError
from entasis.shape import layout
from entasis.shape.shapes import ModelShape


def layer_bytes_per_token(
    shape: ModelShape,
    index: int,
    sequence: int,
    *,
    precision: Literal["fp32", "bf16"] = "bf16",
    attention: Literal["sdpa", "plain", "flex"] = "sdpa",
) -> int:
    """Bytes that one layer keeps for each token."""
    layer, d, k = shape.layers[index], shape.d_model, shape.head_dim
    h, g = layer.n_heads, layer.n_kv_heads
    b = 4 if precision == "fp32" else 2
    # In fp32 what a norm returns is kept once. Autocast converts it anew for each matrix.
    ffn = layout.ffn_kind(shape, layer)
    inputs = (1, 1) if precision == "fp32" else (3, ffn.reading)
    total = 0
    if h:
        total += _norm(d, shape.norm) + inputs[0] * d * b
        if shape.qk_norm != "none":
            groups = h + g if shape.qk_norm == "head" else 2
            total += 8 * k * (h + g) + 4 * groups
        if attention != "plain":
            total += b * k * (3 * h + 2 * g) + 4 * h
        else:
            total += b * k * (2 * h + 2 * g) + math.ceil(b * h * _keys(sequence))
    if layer.d_ff:
        total += _norm(d, shape.norm) + inputs[1] * d * b
        total += ffn.kept(layout.axis_sizes(shape, layer)) * b
    return total


def peak_bytes_per_token(layers: list[int], checkpointed: Collection[int], d_model: int) -> int:
    """The most that layers of the given sizes hold at any moment of a step, some of them checkpointed."""
    held = peak = 0
    for i, size in enumerate(layers):
        peak = max(peak, held + size)
        held += 4 * d_model if i in checkpointed else size
    return peak


def choose_checkpointed_layers(
    shape: ModelShape,
    limit: int,
    *,
    tokens: int,
    sequence: int,
    precision: Literal["fp32", "bf16"],
    attention: Literal["sdpa", "plain", "flex"],
    first: int = 0,
) -> list[int]:
    """The layers to put under activation checkpointing so that `tokens` tokens at once need at most `limit` bytes.

    The costliest are taken first, until it suffices; then those that it also suffices without are left out again.
    Layers below `first` are frozen and keep nothing. Raises `UserError` when checkpointing every layer does not suffice.
    """
    sizes = [
        layer_bytes_per_token(shape, i, sequence, precision=precision, attention=attention)
        if i >= first
        else 0
        for i in range(shape.n_layers)
    ]
    costliest = sorted(range(first, shape.n_layers), key=lambda i: (-sizes[i], i))

    def need(chosen: Collection[int]) -> int:
        return peak_bytes_per_token(sizes, chosen, shape.d_model) * tokens

    for count in range(len(costliest) + 1):
        chosen = set(costliest[:count])
        if need(chosen) <= limit:
            for i in sorted(chosen, reverse=True):
                if need(chosen - {i}) <= limit:
                    chosen.remove(i)
            return sorted(chosen)
    least = need(costliest)
    raise UserError(
        f"recipe: activation_memory is {limit / 2**20:,.1f} MiB, but {tokens:,} tokens at once need "
        f"{least / 2**20:,.1f} MiB with every layer under activation checkpointing; lower batch.micro or raise activation_memory"
    )


def _keys(sequence: int) -> float:
    """Plain attention's attention weights per query: blocks of 128 queries, and no keys behind a block."""
    ends = [min(sequence, t + 128) for t in range(0, sequence, 128)]
    return sum(end * (end - 128 * i) for i, end in enumerate(ends)) / sequence


def _norm(width: int, kind: str) -> int:
    # RMSNorm: its input and the normalised one; LayerNorm: its input.
    return 8 * width + 4 if kind == "rmsnorm" else 4 * width + 8
