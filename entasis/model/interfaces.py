"""The modules behind `entasis.shape.interfaces`, one for each kind under the same name: ids [B, T] → x [B, T, D].

Frozen ones hold what the layout says is stored, as parameters that want no gradient, and compute the rest from the id.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from entasis.data import glyphs
from entasis.errors import UserError
from entasis.registry import Registry
from entasis.shape import interfaces
from entasis.shape.interfaces import AffineBinary, Codes, Glyph
from entasis.shape.shapes import ModelShape

EMBEDDINGS: Registry[type[nn.Module]] = Registry("model: interface kind")


def build(shape: ModelShape) -> nn.Module:
    """The interface's module. Raises `UserError` for a kind that has none."""
    return EMBEDDINGS.find(interfaces.name_of(shape.interface))(shape)


@EMBEDDINGS.register("learned")
class LearnedTable(nn.Embedding):
    """A trained table [V, D]."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape.vocabulary, shape.d_model)


@EMBEDDINGS.register("random")
class FrozenTable(LearnedTable):
    """A table [V, D] that is never trained; `random` ones are drawn by the initialisation, as learned ones are."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape)
        self.shape = shape
        self.weight.requires_grad_(False)


@EMBEDDINGS.register("glyph")
class GlyphTable(FrozenTable):
    """The drawings of `entasis.data.glyphs`."""

    @torch.no_grad()
    def fill(self, tokenizer: Path | None) -> None:
        """Draws the tokens of `tokenizer`, or takes the drawings from the cache. Raises `UserError`."""
        if tokenizer is None:
            raise UserError("interface glyph: its table is drawn from a tokenizer, and there is none here")
        table = glyphs.table(cast(Glyph, self.shape.interface), self.shape, tokenizer)
        self.weight.copy_(torch.from_numpy(table))


@EMBEDDINGS.register("binary")
@EMBEDDINGS.register("random_codes")
class CodedTokens(nn.Module):
    """A code of K bits for each token, spread over D channels with fixed signs: the id's own bits, or stored ones."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        interface = cast(Codes, shape.interface)
        self.width, self.n_bits = shape.d_model, interface.n_bits(shape)
        self.tiled = interface.order == "tiled"
        self.signed, self.balanced = interface.values != "bits", interface.values == "balanced"
        self.codes: nn.Parameter | None = None
        if interface.table(shape) is not None:
            self.codes = nn.Parameter(torch.empty(shape.vocabulary, self.n_bits), requires_grad=False)
        self.shape = shape

    @torch.no_grad()
    def fill(self, tokenizer: Path | None) -> None:
        """Writes the stored codes, where there are any."""
        if self.codes is not None:
            self.codes.copy_(torch.from_numpy(cast(Codes, self.shape.interface).codes(self.shape)))

    def recode(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """The number whose bits are the token's code."""
        return ids_BT

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        channel_D = torch.arange(self.width, device=ids_BT.device)
        each = self.width // self.n_bits
        bit_D = channel_D % self.n_bits if self.tiled else channel_D // each
        if self.codes is not None:
            x_BTD = F.embedding(ids_BT, self.codes)[..., bit_D]
        else:
            x_BTD = (self.recode(ids_BT)[..., None] >> bit_D & 1).float()
        if not self.signed:
            return x_BTD
        x_BTD = 2 * x_BTD - 1
        if not self.balanced:
            return x_BTD
        return x_BTD * (1 - 2 * ((channel_D // self.n_bits if self.tiled else channel_D) % 2))


@EMBEDDINGS.register("affine_binary")
class AffineTokens(CodedTokens):
    """A·c ⊕ b of the id's bits c: one exclusive or for each bit."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape)
        self.columns, self.offset = cast(AffineBinary, shape.interface).recoding(shape)

    def recode(self, ids_BT: torch.Tensor) -> torch.Tensor:
        recoded_BT = torch.full_like(ids_BT, self.offset)
        for j, column in enumerate(self.columns):
            recoded_BT = recoded_BT ^ ((ids_BT >> j & 1) * column)
        return recoded_BT
