"""The feed-forward networks, one module for each kind of `entasis.shape.ffn_kinds`, with the layer's own width."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from entasis.registry import Registry
from entasis.shape import layout
from entasis.shape.shapes import LayerShape, ModelShape

FEEDFORWARDS: Registry[type[nn.Module] | functools.partial[nn.Module]] = Registry("model: ffn kind")


def build(shape: ModelShape, layer: LayerShape) -> nn.Module:
    """The layer's FFN, x [B, T, D] → [B, T, D]. Raises `UserError` for a kind that has no module."""
    return FEEDFORWARDS.find(layout.ffn_kind(shape, layer).name)(shape, layer)


@FEEDFORWARDS.register("swiglu")
class SwiGLU(nn.Module):
    """`down(silu(gate x) · up x)` (2002.05202)."""

    def __init__(self, shape: ModelShape, layer: LayerShape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.d_model, layer.d_ff, bias=shape.ffn_bias)
        self.up = nn.Linear(shape.d_model, layer.d_ff, bias=shape.ffn_bias)
        self.down = nn.Linear(layer.d_ff, shape.d_model, bias=shape.ffn_bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class GELU(nn.Module):
    """`down(gelu(up x))`, with the error function or its tanh approximation."""

    def __init__(self, shape: ModelShape, layer: LayerShape, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate
        self.up = nn.Linear(shape.d_model, layer.d_ff, bias=shape.ffn_bias)
        self.down = nn.Linear(layer.d_ff, shape.d_model, bias=shape.ffn_bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x_BTD), approximate=self.approximate))


FEEDFORWARDS.register("gelu")(functools.partial(GELU, approximate="none"))
FEEDFORWARDS.register("gelu_tanh")(functools.partial(GELU, approximate="tanh"))
