"""Rotary positions (2104.09864) in the half-split convention of Hugging Face's Llama."""

from __future__ import annotations

import math

import torch

from entasis.errors import UserError
from entasis.shape.shapes import ModelShape

Rotation = tuple[torch.Tensor, torch.Tensor]
"""(cos_TK, sin_TK) of a stretch of positions: what `rotate` turns queries and keys by."""


def frequencies(shape: ModelShape) -> torch.Tensor:
    """Inverse frequencies [head_dim / 2], fp32, with `rope_scaling` (linear, llama3) applied.

    Raises `UserError` for another kind of scaling.
    """
    inverse_K = 1.0 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
    scaling = shape.rope_scaling
    kind = scaling.get("rope_type", scaling.get("type")) if scaling else "default"
    if not scaling or kind == "default":
        return inverse_K
    factor = float(scaling["factor"])
    if kind == "linear":
        return inverse_K / factor
    if kind == "llama3":
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        turns_K = float(scaling["original_max_position_embeddings"]) * inverse_K / (2 * math.pi)
        smooth_K = ((turns_K - low) / (high - low)).clamp(0, 1)
        return (1 - smooth_K) * inverse_K / factor + smooth_K * inverse_K
    raise UserError(f"shape: rope_scaling {kind!r} is not known; linear and llama3 are")


def table(inverse_K: torch.Tensor, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos_TK, sin_TK), fp32, for positions start .. start + length."""
    if torch.compiler.is_compiling():
        cos_TK, sin_TK = _opaque(inverse_K, start, length)
        return cos_TK, sin_TK
    return _table(inverse_K, start, length)


def _table(inverse_K: torch.Tensor, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles_TK = torch.outer(torch.arange(start, start + length, device=inverse_K.device).float(), inverse_K)
    return angles_TK.cos(), angles_TK.sin()


# Compiled, the table is one operator: taken into the loops that use it, cosines would be computed for every head.
_opaque = torch.library.custom_op("entasis::rotary_table", _table, mutates_args=())


@_opaque.register_fake
def _(inverse_K: torch.Tensor, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (length, inverse_K.shape[0])
    return inverse_K.new_empty(shape), inverse_K.new_empty(shape)


def rotate(x_BHTK: torch.Tensor, cos_TK: torch.Tensor, sin_TK: torch.Tensor) -> torch.Tensor:
    """Turns queries or keys; the two halves of the head are real and imaginary parts."""
    a, b = x_BHTK.to(torch.promote_types(x_BHTK.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((a * cos_TK - b * sin_TK, b * cos_TK + a * sin_TK), dim=-1).to(x_BHTK.dtype)
