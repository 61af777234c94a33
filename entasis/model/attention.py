"""Causal grouped-query attention with its own number of heads in every layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from entasis.model.cache import KVCache
from entasis.model.normalisation import Norm
from entasis.model.plain_attention import plain_attention
from entasis.model.rotary import Rotation, rotate
from entasis.shape.shapes import LayerShape, ModelShape

Mask = torch.Tensor | BlockMask


def attention_mask(
    start: int, T: int, document_ids_BT: torch.Tensor | None, device: torch.device, implementation: str
) -> Mask | None:
    """True where attention is allowed, [B or 1, T, S]; None when plain causal attention says the same."""
    if document_ids_BT is not None:
        if implementation == "flex" and torch.compiler.is_compiling():
            return _blocks(document_ids_BT)
        same_BTS = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
        return same_BTS.tril()
    if start and T > 1:
        # Several new tokens on top of a cache: sdpa's own causal mask would be aligned to the wrong corner.
        return torch.ones(1, T, start + T, dtype=torch.bool, device=device).tril(start)
    return None


def _blocks(document_ids_BT: torch.Tensor) -> BlockMask:
    """Which blocks of 128 × 128 hold anything, instead of the mask; what is in them is computed where it is needed."""
    B, T = document_ids_BT.shape

    def allowed(b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return (t >= s) & (document_ids_BT[b, t] == document_ids_BT[b, s])

    return create_block_mask(allowed, B, None, T, T, device=document_ids_BT.device)


class Attention(nn.Module):
    """x [B, T, D] → [B, T, D].

    `implementation` is "sdpa" (torch's fused attention), "plain" (two matmuls and a softmax), which is the faster
    of the two on some CPUs, or "flex": sdpa, but compiled code keeps to documents by FlexAttention (2412.05496), which
    needs no mask of T × T.
    """

    def __init__(self, shape: ModelShape, layer: LayerShape, implementation: str) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = layer.n_heads, layer.n_kv_heads, shape.head_dim
        self.scale = shape.attention_scale or 1 / math.sqrt(shape.head_dim)
        self.implementation = implementation
        q_width, kv_width = layer.n_heads * shape.head_dim, layer.n_kv_heads * shape.head_dim
        self.query = nn.Linear(shape.d_model, q_width, bias=shape.qkv_bias)
        self.key = nn.Linear(shape.d_model, kv_width, bias=shape.qkv_bias)
        self.value = nn.Linear(shape.d_model, kv_width, bias=shape.qkv_bias)
        self.output = nn.Linear(q_width, shape.d_model, bias=shape.attention_output_bias)
        self.qk_norm = shape.qk_norm
        if shape.qk_norm != "none":
            full = shape.qk_norm == "full"
            self.query_norm = Norm(q_width if full else shape.head_dim, shape, rms=True)
            self.key_norm = Norm(kv_width if full else shape.head_dim, shape, rms=True)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotation: Rotation | None,
        *,
        mask_BTS: Mask | None = None,
        cache: KVCache | None = None,
        index: int = 0,
    ) -> torch.Tensor:
        """`rotation` is (cos, sin) of `rotary.table`; `mask_BTS` comes from `attention_mask`."""
        B, T, _ = x_BTD.shape
        q_BHTK, k_BGTK, v_BGTK = self.project(x_BTD, rotation)
        if cache is not None:
            k_BGTK, v_BGTK = cache.append(index, k_BGTK.to(v_BGTK.dtype), v_BGTK)
            k_BGTK, v_BGTK = k_BGTK.to(q_BHTK.dtype), v_BGTK.to(q_BHTK.dtype)
        if isinstance(mask_BTS, BlockMask):
            grouped = self.n_heads != self.n_kv_heads
            y_BHTK = flex_attention(
                q_BHTK, k_BGTK, v_BGTK, block_mask=mask_BTS, scale=self.scale, enable_gqa=grouped
            )
        else:
            attend = self._plain if self.implementation == "plain" else self._sdpa
            y_BHTK = attend(q_BHTK, k_BGTK, v_BGTK, mask_BTS)
        return self.output(y_BHTK.transpose(1, 2).reshape(B, T, -1))

    def project(
        self, x_BTD: torch.Tensor, rotation: Rotation | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [B, H, T, K], keys and values [B, G, T, K], normed and turned."""
        B, T, _ = x_BTD.shape
        q, k, v = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.qk_norm == "full":
            q, k = self.query_norm(q), self.key_norm(k)
        q_BHTK = q.view(B, T, self.n_heads, self.head_dim)
        k_BGTK = k.view(B, T, self.n_kv_heads, self.head_dim)
        v_BGTK = v.view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)
        if self.qk_norm == "head":
            q_BHTK, k_BGTK = self.query_norm(q_BHTK), self.key_norm(k_BGTK)
        q_BHTK, k_BGTK = q_BHTK.transpose(1, 2), k_BGTK.transpose(1, 2)
        if rotation is not None:
            q_BHTK, k_BGTK = rotate(q_BHTK, *rotation), rotate(k_BGTK, *rotation)
        return q_BHTK, k_BGTK, v_BGTK

    def log_weights(self, x_BTD: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        """Logarithms of the causal attention weights [B, H, T, S], fp32, which fused attention does not hand out."""
        q_BHTK, k_BGTK, _ = self.project(x_BTD, rotation)
        k_BHTK = k_BGTK.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        scores_BHTS = q_BHTK.float() @ k_BHTK.float().transpose(2, 3) * self.scale
        later_TS = torch.ones(scores_BHTS.shape[2:], dtype=torch.bool, device=x_BTD.device).triu(1)
        return scores_BHTS.masked_fill(later_TS, float("-inf")).log_softmax(-1)

    def _sdpa(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask_BTS: torch.Tensor | None
    ) -> torch.Tensor:
        mask = None if mask_BTS is None else mask_BTS[:, None]
        causal = mask is None and q.shape[2] > 1
        grouped = self.n_heads != self.n_kv_heads
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=grouped
        )

    def _plain(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask_BTS: torch.Tensor | None
    ) -> torch.Tensor:
        B, H, T, K = q.shape
        q_BGRTK = (q.view(B, self.n_kv_heads, H // self.n_kv_heads, T, K) * self.scale).contiguous()
        return plain_attention(q_BGRTK, k.contiguous(), v.contiguous(), mask_BTS).view(B, H, T, K)
