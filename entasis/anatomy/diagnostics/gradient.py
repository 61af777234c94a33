"""The squared gradient of the loss by each layer's parameters (empirical Fisher information)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import torch

from entasis.anatomy.layer_weights import only_trainable
from entasis.anatomy.measures import Row, measure
from entasis.anatomy.subject import Subject

WINDOWS = 64


@measure(
    "gradient",
    kind="structure",
    gives={
        "fisher": "mean over windows of the squared norm of the loss's gradient by the layer's parameters, "
        "loss in nats per token",
        "fisher_per_parameter": "the same divided by the number of the layer's parameters",
    },
)
def gradient(subject: Subject) -> Iterable[Row]:
    """One window at a time, at most the first 64 windows of the text."""
    model = subject.model
    layers = [list(block.parameters()) for block in model.blocks]
    parameters = [p for layer in layers for p in layer]
    sums_L, windows = np.zeros(subject.n_layers), 0
    with only_trainable(model, parameters):
        for batch in subject.batches():
            rows = zip(batch.tokens_BT.split(1), batch.targets_BT.split(1), strict=True)
            for tokens_1T, targets_1T in rows:
                counted = int((targets_1T != -100).sum())
                if windows >= WINDOWS or not counted:
                    continue
                with torch.enable_grad(), subject.autocast():
                    loss = model.loss(tokens_1T, targets_1T) / counted
                squares = (float(g.double().square().sum()) for g in torch.autograd.grad(loss, parameters))
                sums_L += [sum(itertools.islice(squares, len(layer))) for layer in layers]
                windows += 1
    for index, layer in enumerate(layers):
        size = sum(p.numel() for p in layer)
        yield Row("fisher", index, sums_L[index] / windows)
        yield Row("fisher_per_parameter", index, sums_L[index] / windows / size)
