"""RMSNorm and LayerNorm, computed in fp32 (in fp64 for a model in fp64)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from entasis.shape.shapes import ModelShape


class Norm(nn.Module):
    """Normalises the last dimension of x [..., width].

    `scale`, if there is one, multiplies the output: LayerNorm scaling (2502.05795) gives 1/sqrt(layer) here.
    """

    def __init__(self, width: int, shape: ModelShape, *, bias: bool = False, rms: bool = False) -> None:
        super().__init__()
        self.rms, self.eps = rms or shape.norm == "rmsnorm", shape.norm_eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: torch.Tensor, scale: float | torch.Tensor | None = None) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, width = self.weight.to(wide), (x.shape[-1],)
        if self.rms:
            y = F.rms_norm(x.to(wide), width, weight, self.eps)
        else:
            bias = None if self.bias is None else self.bias.to(wide)
            y = F.layer_norm(x.to(wide), width, weight, bias, self.eps)
        return (y if scale is None else y * scale).to(x.dtype)
