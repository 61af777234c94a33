"""How tokens enter the model and leave it."""

from __future__ import annotations

import torch
from torch import nn

from entasis.model import interfaces
from entasis.model.loss import summed_nll
from entasis.shape.shapes import ModelShape


class Embedding(nn.Module):
    """tokens [B, T] → x [B, T, D]; adds a learned position where the shape has them."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.tokens = interfaces.build(shape)
        learned = shape.positions == "learned"
        self.positions = nn.Embedding(shape.context, shape.d_model) if learned else None

    def forward(self, tokens_BT: torch.Tensor, start: int = 0) -> torch.Tensor:
        x_BTD = self.tokens(tokens_BT)
        if self.positions is not None:
            stop = start + tokens_BT.shape[1]
            x_BTD = x_BTD + self.positions.weight[start:stop]
        return x_BTD


class Head(nn.Module):
    """The output matrix [V, D], unless the embedding is it, and an optional bias [V].

    Called, it is the head with its loss: hidden states x [B, T, D], the matrix and targets [B, T] → the summed negative
    log-likelihood.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        tied = shape.tied_embeddings
        self.weight = None if tied else nn.Parameter(torch.empty(shape.vocabulary, shape.d_model))
        self.bias = nn.Parameter(torch.empty(shape.vocabulary)) if shape.head_bias else None
        self.logit_scale = shape.logit_scale

    def forward(self, x_BTD: torch.Tensor, weight_VD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        return summed_nll(x_BTD.flatten(0, 1), weight_VD, self.bias, targets_BT.flatten(), self.logit_scale)
