"""How much the loss pulls at each layer."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

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
    learning = [(p, p.requires_grad) for p in model.parameters()]
    sums_L, windows = np.zeros(subject.n_layers), 0
    try:
        for p, _ in learning:
            p.requires_grad_(False)
        for p in (p for layer in layers for p in layer):
            p.requires_grad_(True)
        for batch in subject.batches():
            for tokens_1T, targets_1T in zip(
                batch.tokens_BT.split(1), batch.targets_BT.split(1), strict=True
            ):
                counted = int((targets_1T != -100).sum())
                if windows >= WINDOWS or not counted:
                    continue
                with torch.enable_grad(), subject.autocast():
                    loss = model.loss(tokens_1T, targets_1T) / counted
                grads = torch.autograd.grad(loss, [p for layer in layers for p in layer])
                squares = iter([float(g.double().square().sum()) for g in grads])
                sums_L += [sum(next(squares) for _ in layer) for layer in layers]
                windows += 1
    finally:
        for p, learns in learning:
            p.requires_grad_(learns)
    for index, layer in enumerate(layers):
        size = sum(p.numel() for p in layer)
        yield Row("fisher", index, sums_L[index] / windows)
        yield Row("fisher_per_parameter", index, sums_L[index] / windows / size)
