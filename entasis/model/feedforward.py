"""The feed-forward network of one layer, with that layer's own width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from entasis.shape.shapes import LayerShape, ModelShape


class FeedForward(nn.Module):
    """x [B, T, D] → [B, T, D]: SwiGLU `down(silu(gate x) · up x)` (2002.05202) or `down(gelu(up x))`."""

    def __init__(self, shape: ModelShape, layer: LayerShape) -> None:
        super().__init__()
        self.kind = shape.ffn
        if self.kind == "swiglu":
            self.gate = nn.Linear(shape.d_model, layer.d_ff, bias=shape.ffn_bias)
        self.up = nn.Linear(shape.d_model, layer.d_ff, bias=shape.ffn_bias)
        self.down = nn.Linear(layer.d_ff, shape.d_model, bias=shape.ffn_bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh" if self.kind == "gelu_tanh" else "none"))
