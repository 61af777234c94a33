"""Entropy of the attention weights."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from entasis.anatomy.layer_sweep import walk_layers
from entasis.anatomy.measures import Row, measure
from entasis.anatomy.subject import Subject
from entasis.model import rotary
from entasis.model.attention import Attention
from entasis.model.block import Block


@measure(
    "attention_entropy",
    kind="structure",
    gives={
        "attention_entropy": "entropy of a head's weights / its largest possible, mean over heads and positions"
    },
)
def attention_entropy(subject: Subject) -> Iterable[Row]:
    """1 attends to everything before it alike, 0 to one token. Layers without attention have no row."""
    sums_L, counts_L = np.zeros(subject.n_layers), np.zeros(subject.n_layers)
    for batch in subject.batches():
        rotation = subject.rotation(batch)
        for layer, x_BTD, _ in walk_layers(subject, batch):
            block = subject.model.blocks[layer]
            assert isinstance(block, Block)
            if block.attention is None or x_BTD.shape[1] < 2:
                continue
            # One window at a time: the weights are T² numbers for each head.
            for x_1TD in x_BTD.split(1):
                y_1TD = x_1TD if block.reordered else block.attention_norm(x_1TD, block.norm_scale)
                entropy_HT = _entropy(block.attention, y_1TD, rotation)
                most_T = torch.arange(1, entropy_HT.shape[1] + 1, device=entropy_HT.device).log()
                sums_L[layer] += float((entropy_HT[:, 1:] / most_T[1:]).mean(0).sum())
                counts_L[layer] += entropy_HT.shape[1] - 1
    for index in np.flatnonzero(counts_L):
        yield Row("attention_entropy", int(index), float(sums_L[index] / counts_L[index]))


@torch.no_grad()
def _entropy(
    attention: Attention, x_1TD: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """[H, T] in nats. The weights again, as the fused attention does not hand them out."""
    T, k = x_1TD.shape[1], attention.head_dim
    q, key = attention.query(x_1TD), attention.key(x_1TD)
    if attention.qk_norm == "full":
        q, key = attention.query_norm(q), attention.key_norm(key)
    q_HTK, k_GTK = q.view(T, attention.n_heads, k), key.view(T, attention.n_kv_heads, k)
    if attention.qk_norm == "head":
        q_HTK, k_GTK = attention.query_norm(q_HTK), attention.key_norm(k_GTK)
    q_HTK, k_GTK = q_HTK.transpose(0, 1), k_GTK.transpose(0, 1)
    if rotation is not None:
        q_HTK, k_GTK = rotary.rotate(q_HTK, *rotation), rotary.rotate(k_GTK, *rotation)
    k_HTK = k_GTK.repeat_interleave(attention.n_heads // attention.n_kv_heads, dim=0)
    scores_HTS = (q_HTK.float() @ k_HTK.float().transpose(1, 2)) * attention.scale
    later = torch.ones(T, T, dtype=torch.bool, device=scores_HTS.device).triu(1)
    log_HTS = scores_HTS.masked_fill(later, float("-inf")).log_softmax(-1)
    return -(log_HTS.exp() * log_HTS.masked_fill(later, 0.0)).sum(-1)
