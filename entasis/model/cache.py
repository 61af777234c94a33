"""The keys and values of what has been read, so that generation reads each token once."""

from __future__ import annotations

import torch

from entasis.shape.shapes import ModelShape


class KVCache:
    """Room for `length` positions: per layer keys and values [batch, n_kv_heads, length, head_dim].

    `position` is how many are filled; the model advances it after each call.
    """

    def __init__(
        self, shape: ModelShape, batch: int, length: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.length, self.position = length, 0
        self.layers = [
            torch.zeros(2, batch, layer.n_kv_heads, length, shape.head_dim, dtype=dtype, device=device)
            for layer in shape.layers
        ]

    def append(
        self, layer: int, key_BHTK: torch.Tensor, value_BHTK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new positions of one layer; returns all keys and values up to them."""
        stop = self.position + key_BHTK.shape[2]
        assert stop <= self.length, f"the cache holds {self.length} positions, {stop} are asked for"
        store = self.layers[layer]
        store[0][:, :, self.position : stop] = key_BHTK
        store[1][:, :, self.position : stop] = value_BHTK
        return store[0][:, :, :stop], store[1][:, :, :stop]
