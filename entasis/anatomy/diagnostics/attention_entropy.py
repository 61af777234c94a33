"""Entropy of the attention weights."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from entasis.anatomy.layer_sweep import walk_layers
from entasis.anatomy.measures import Row, measure
from entasis.anatomy.subject import Subject
from entasis.model.block import Block


@measure(
    "attention_entropy",
    kind="structure",
    gives={
        "attention_entropy": "entropy of a head's weights / its largest possible, mean over heads and positions"
    },
)
@torch.no_grad()
def attention_entropy(subject: Subject) -> Iterable[Row]:
    """1 attends to everything before it alike, 0 to one token. Layers without attention have no row."""
    sums_L, counts_L = np.zeros(subject.n_layers), np.zeros(subject.n_layers)
    for batch in subject.batches():
        rotation, length = subject.rotation(batch), batch.tokens_BT.shape[1]
        largest_T = torch.arange(1, length + 1, device=subject.device).log()
        for layer, x_BTD, _ in walk_layers(subject, batch):
            block = subject.model.blocks[layer]
            assert isinstance(block, Block)
            if block.attention is None or length < 2:
                continue
            # One window at a time: the weights are T² numbers for each head.
            for x_1TD in x_BTD.split(1):
                y_1TD = block.read(x_1TD, block.attention_norm)
                log_HTS = block.attention.log_weights(y_1TD, rotation)[0]
                entropy_HT = -(log_HTS.exp() * log_HTS.masked_fill(log_HTS.isneginf(), 0.0)).sum(-1)
                sums_L[layer] += float((entropy_HT[:, 1:] / largest_T[1:]).mean(0).sum())
                counts_L[layer] += length - 1
    for index in np.flatnonzero(counts_L):
        yield Row("attention_entropy", int(index), float(sums_L[index] / counts_L[index]))
