"""The decoder: layers that need not be equal, between an embedding and a head."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from entasis.errors import UserError
from entasis.model import rotary
from entasis.model.attention import Mask, attention_mask
from entasis.model.block import Block
from entasis.model.cache import KVCache
from entasis.model.embedding import Embedding, Head
from entasis.model.normalisation import Norm
from entasis.model.rotary import Rotation
from entasis.shape.shapes import ModelShape


class Transformer(nn.Module):
    """A decoder-only language model of any `ModelShape`.

    Parameters are uninitialised numbers until `initialisation.init_weights` or `weights.load` fills them.
    """

    def __init__(self, shape: ModelShape, *, attention: Literal["sdpa", "plain", "flex"] = "sdpa") -> None:
        super().__init__()
        self.shape, self.attention = shape, attention
        self.embedding = Embedding(shape)
        self.blocks = nn.ModuleList(Block(shape, i, attention) for i in range(shape.n_layers))
        self.norm = Norm(shape.d_model, shape, bias=shape.norm_bias)
        self.head = Head(shape)
        self._on_gpu: torch.Tensor | None = None

    def forward(
        self,
        tokens_BT: torch.Tensor,
        *,
        cache: KVCache | None = None,
        document_ids_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, V] of the token after each position.

        With a `cache`, `tokens_BT` continue what it holds. `document_ids_BT` keeps attention inside a document.
        """
        return self.head_logits(self.hidden(tokens_BT, cache=cache, document_ids_BT=document_ids_BT))

    def hidden(
        self,
        tokens_BT: torch.Tensor,
        *,
        cache: KVCache | None = None,
        document_ids_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the head reads: x [B, T, D] after the final norm. Raises `UserError` beyond a position table."""
        start, T = cache.position if cache else 0, tokens_BT.shape[1]
        x_BTD = self.embed(tokens_BT, start)
        rotation = self.rotation(start, T, tokens_BT.device)
        mask_BTS = attention_mask(start, T, document_ids_BT, tokens_BT.device, self.attention)
        x_BTD = self.run_layers(x_BTD, rotation, mask_BTS=mask_BTS, cache=cache)
        if cache:
            cache.position += T
        return self.norm(x_BTD)

    def run_layers(
        self,
        x_BTD: torch.Tensor,
        rotation: Rotation | None,
        first: int = 0,
        stop: int | None = None,
        *,
        mask_BTS: Mask | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Takes the residual stream x [B, T, D] from in front of layer `first` to in front of layer `stop`.

        Without `stop` to what the final norm reads. `rotation` comes from `rotation`, `mask_BTS` from `attention_mask`.
        """
        for index in range(first, len(self.blocks) if stop is None else stop):
            x_BTD = self.blocks[index](x_BTD, rotation, mask_BTS=mask_BTS, cache=cache)
        return x_BTD

    def hidden_states(
        self, tokens_BT: torch.Tensor, *, document_ids_BT: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """The residual stream x [B, T, D] in front of each layer, and last of all what the final norm reads."""
        rotation = self.rotation(0, tokens_BT.shape[1], tokens_BT.device)
        mask_BTS = attention_mask(0, tokens_BT.shape[1], document_ids_BT, tokens_BT.device, self.attention)
        states = [self.embed(tokens_BT)]
        for index in range(len(self.blocks)):
            states.append(self.run_layers(states[-1], rotation, index, index + 1, mask_BTS=mask_BTS))
        return states

    def embed(self, tokens_BT: torch.Tensor, start: int = 0) -> torch.Tensor:
        """x [B, T, D] in front of the first block."""
        if self.shape.positions == "learned" and start + tokens_BT.shape[1] > self.shape.context:
            raise UserError(f"the model has learned positions for {self.shape.context} tokens and no more")
        # A computed interface has no dtype of its own.
        return self.embedding(tokens_BT, start).to(self.norm.weight.dtype)

    def rotation(self, start: int, length: int, device: torch.device) -> Rotation | None:
        """What each block needs to turn queries and keys; None with learned positions."""
        if self.shape.positions == "learned":
            return None
        return rotary.table(self._frequencies(device), start, length)

    def _frequencies(self, device: torch.device) -> torch.Tensor:
        """Of the rotary positions [head_dim / 2]; to a GPU they go once, as a copy from the host waits for all its work."""
        if device.type != "cuda":
            return rotary.frequencies(self.shape).to(device)
        if self._on_gpu is None or self._on_gpu.device != device:
            self._on_gpu = rotary.frequencies(self.shape).to(device)
        return self._on_gpu

    @property
    def head_weight(self) -> torch.Tensor:
        """The output matrix [V, D], shared with the embedding where the shape ties them."""
        table = self.embedding.tokens.weight if self.head.weight is None else self.head.weight
        assert isinstance(table, torch.Tensor)
        return table

    def head_logits(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        logits_BTV = F.linear(x_BTD, self.head_weight, self.head.bias)
        return logits_BTV * self.shape.logit_scale if self.shape.logit_scale != 1.0 else logits_BTV

    def loss(
        self,
        tokens_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        *,
        document_ids_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Summed negative log-likelihood in nats, fp32; targets of -100 do not count."""
        return self.head_loss(self.hidden(tokens_BT, document_ids_BT=document_ids_BT), targets_BT)

    def hidden_before(
        self, tokens_BT: torch.Tensor, stop: int, *, document_ids_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [B, T, D] in front of layer `stop`."""
        rotation = self.rotation(0, tokens_BT.shape[1], tokens_BT.device)
        mask_BTS = attention_mask(0, tokens_BT.shape[1], document_ids_BT, tokens_BT.device, self.attention)
        return self.run_layers(self.embed(tokens_BT), rotation, 0, stop, mask_BTS=mask_BTS)

    def loss_from(
        self,
        x_BTD: torch.Tensor,
        first: int,
        targets_BT: torch.Tensor,
        *,
        document_ids_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`loss` from x [B, T, D] in front of layer `first`."""
        rotation = self.rotation(0, x_BTD.shape[1], x_BTD.device)
        mask_BTS = attention_mask(0, x_BTD.shape[1], document_ids_BT, x_BTD.device, self.attention)
        x_BTD = self.run_layers(x_BTD, rotation, first, mask_BTS=mask_BTS)
        return self.head_loss(self.norm(x_BTD), targets_BT)

    def head_loss(self, x_BTD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """`loss` from hidden states x [B, T, D] after the final norm."""
        loss: torch.Tensor = self.head(x_BTD, self.head_weight, targets_BT)
        return loss
