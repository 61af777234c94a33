"""Structure of what flows: how much each layer changes the residual stream, and in which direction."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F

from entasis.anatomy.intervals import difference
from entasis.anatomy.measures import Row, measure
from entasis.anatomy.stream import climb, document_nll, rotation_of
from entasis.anatomy.subject import Subject
from entasis.model import rotary
from entasis.model.attention import Attention
from entasis.model.block import Block


@measure(
    "stream",
    kind="structure",
    gives={
        "stream_norm": "mean norm of the residual stream behind the layer",
        "update_ratio": "mean norm of the layer's update / norm of the stream in front of it",
        "block_influence": "1 − mean cosine of the stream in front of and behind the layer (2403.03853)",
        "angular_distance": "arccos of that cosine at the last token of each window / π (2403.17887)",
    },
)
def stream(subject: Subject) -> Iterable[Row]:
    sums_LQ = np.zeros((subject.n_layers, 4))
    tokens = windows = 0
    for batch in subject.batches():
        tokens += batch.tokens_BT.numel()
        windows += len(batch.tokens_BT)
        for layer, x_BTD, y_BTD in climb(subject, batch):
            x, y = x_BTD.double(), y_BTD.double()
            cosine_BT = F.cosine_similarity(x, y, dim=-1).clamp(-1, 1)
            in_front_BT = x.norm(dim=-1)
            sums_LQ[layer] += [
                float(y.norm(dim=-1).sum()),
                float(((y - x).norm(dim=-1) / in_front_BT.clamp_min(1e-300)).sum()),
                float((1 - cosine_BT).sum()),
                float(cosine_BT[:, -1].acos().sum() / math.pi),
            ]
    for layer, (norm, update, influence, angle) in enumerate(sums_LQ):
        yield Row("stream_norm", layer, norm / tokens)
        yield Row("update_ratio", layer, update / tokens)
        yield Row("block_influence", layer, influence / tokens)
        yield Row("angular_distance", layer, angle / windows)


@measure(
    "logit_lens",
    kind="structure",
    gives={"logit_lens": "loss of the model stopped behind the layer, nats per token"},
)
def logit_lens(subject: Subject) -> Iterable[Row]:
    """The final norm and the head read the stream early; the last layer's value is the model's loss."""
    nats_LN = np.zeros((subject.n_layers, len(subject.text.names)))
    for batch in subject.batches():
        for layer, _, y_BTD in climb(subject, batch):
            nats_LN[layer] += document_nll(subject, y_BTD, batch)
    found = difference(nats_LN, np.zeros(nats_LN.shape[1]), subject.text.document_tokens, seed=subject.seed)
    for layer in range(subject.n_layers):
        yield Row(
            "logit_lens",
            layer,
            float(found.value[layer]),
            "",
            float(found.low[layer]),
            float(found.high[layer]),
        )


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
        rotation = rotation_of(subject.model, batch)
        for layer, x_BTD, _ in climb(subject, batch):
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
