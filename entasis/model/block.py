"""One layer: attention and feed-forward, each with its norm and its way back into the residual stream."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from entasis.model import feedforward
from entasis.model.attention import Attention, Mask
from entasis.model.cache import KVCache
from entasis.model.normalisation import Norm
from entasis.model.rotary import Rotation
from entasis.shape.shapes import ModelShape


class Block(nn.Module):
    """x [B, T, D] → [B, T, D].

    `pre`: x + f(norm(x)). `reordered` (OLMo2): x + norm(f(x)). A layer with no heads or no FFN lacks that half.
    With `activation_checkpointing` set, the backward pass computes the layer once more instead of keeping what is inside it.
    """

    activation_checkpointing = False

    def __init__(self, shape: ModelShape, index: int, implementation: str) -> None:
        super().__init__()
        layer = shape.layers[index]
        self.index, self.reordered, self.scale = (
            index,
            shape.norm_placement == "reordered",
            shape.residual_scale,
        )
        self.norm_scale: float | torch.Tensor | None = (
            1 / math.sqrt(index + 1) if shape.norm_scaling else None
        )
        if layer.n_heads:
            self.attention_norm = Norm(shape.d_model, shape, bias=shape.norm_bias)
        self.attention = Attention(shape, layer, implementation) if layer.n_heads else None
        if layer.d_ff:
            self.feedforward_norm = Norm(shape.d_model, shape, bias=shape.norm_bias)
        self.feedforward = feedforward.build(shape, layer) if layer.d_ff else None

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotation: Rotation | None,
        *,
        mask_BTS: Mask | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            # Nothing here is random, so no state of a generator need be kept.
            return checkpoint(
                self._layer, x_BTD, rotation, mask_BTS, cache, use_reentrant=False, preserve_rng_state=False
            )
        return self._layer(x_BTD, rotation, mask_BTS, cache)

    def _layer(
        self,
        x_BTD: torch.Tensor,
        rotation: Rotation | None,
        mask_BTS: Mask | None,
        cache: KVCache | None,
    ) -> torch.Tensor:
        if self.attention is not None:
            y_BTD = self.attention(
                self.read(x_BTD, self.attention_norm),
                rotation,
                mask_BTS=mask_BTS,
                cache=cache,
                index=self.index,
            )
            x_BTD = self._add(x_BTD, y_BTD, self.attention_norm)
        if self.feedforward is not None:
            y_BTD = self.feedforward(self.read(x_BTD, self.feedforward_norm))
            x_BTD = self._add(x_BTD, y_BTD, self.feedforward_norm)
        return x_BTD

    def read(self, x_BTD: torch.Tensor, norm: Norm) -> torch.Tensor:
        """The input of attention or FFN: the residual stream, normed unless norms come after the branch."""
        return x_BTD if self.reordered else norm(x_BTD, self.norm_scale)

    def _add(self, x_BTD: torch.Tensor, y_BTD: torch.Tensor, norm: Norm) -> torch.Tensor:
        if self.reordered:
            y_BTD = norm(y_BTD, self.norm_scale)
        return x_BTD + (y_BTD * self.scale if self.scale != 1.0 else y_BTD)
