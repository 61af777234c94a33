"""One sweep over the layers: changing layer l runs only the layers above it.

Naively, the loss of a model without layer l, for every l, costs L forward passes. The sweep carries the unchanged residual
stream x_l upwards: in front of each layer the changed layer and the layers above are run from it, then the layer itself
takes it to layer l + 1. That is L + L (L − 1) / 2 evaluations of a block instead of L², and as only one unchanged stream
is needed at a time, nothing is cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from entasis.anatomy.subject import Subject
from entasis.anatomy.text import TextBatch
from entasis.evaluate.bits_per_byte import head_nll
from entasis.model.rotary import Rotation

LayerFunction = Callable[[torch.Tensor, Rotation | None], torch.Tensor]
"""(x_BTD, rotation) → x_BTD: a layer, or what stands in for it."""


@torch.no_grad()
def walk_layers(subject: Subject, batch: TextBatch) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yields (l, stream in front of layer l, stream behind it), [B, T, D] each, from the lowest layer up."""
    model, rotation = subject.model, subject.rotation(batch)
    x_BTD = model.embed(batch.tokens_BT)
    for index in range(len(model.blocks)):
        with subject.autocast():
            y_BTD = model.run_layers(x_BTD, rotation, index, index + 1)
        yield index, x_BTD, y_BTD
        x_BTD = y_BTD


@torch.no_grad()
def score_documents(subject: Subject, x_BTD: torch.Tensor, batch: TextBatch) -> np.ndarray:
    """float64 [documents]: nats of the batch's targets when norm and head read this residual stream."""
    model, targets_N = subject.model, batch.targets_BT.flatten()
    with subject.autocast():
        nll_N = head_nll(model, model.norm(x_BTD).flatten(0, 1), targets_N)[targets_N != -100]
    return np.bincount(batch.owner_N, weights=nll_N.double().cpu().numpy(), minlength=len(subject.text.names))


@torch.no_grad()
def score_model(subject: Subject) -> np.ndarray:
    """float64 [documents]: nats of the unchanged model."""
    model, total = subject.model, np.zeros(len(subject.text.names))
    for batch in subject.batches():
        with subject.autocast():
            x_BTD = model.run_layers(model.embed(batch.tokens_BT), subject.rotation(batch))
        total += score_documents(subject, x_BTD, batch)
    return total


@torch.no_grad()
def sweep_layers(
    subject: Subject, name: str, change: Callable[[int, TextBatch], LayerFunction | None], *, width: int = 1
) -> np.ndarray:
    """float64 [L + 1, documents]: nats with layer l changed, for each l; the last row is the unchanged model.

    `change(l, batch)` returns what stands in for layer l and the `width` − 1 above it. Where it returns None the row is
    NaN, as for layers that were not chosen. Each batch's result is kept in the subject's folder under `name`.
    """
    model, chosen = subject.model, subject.chosen

    def score(batch: TextBatch) -> np.ndarray:
        rotation = subject.rotation(batch)
        nats = np.full((subject.n_layers + 1, len(subject.text.names)), np.nan)
        for layer, x_BTD, y_BTD in walk_layers(subject, batch):
            if layer in chosen and (changed := change(layer, batch)):
                with subject.autocast():
                    x_BTD = model.run_layers(changed(x_BTD, rotation), rotation, layer + width)
                nats[layer] = score_documents(subject, x_BTD, batch)
            top_BTD = y_BTD
        nats[-1] = score_documents(subject, top_BTD, batch)
        return nats

    total = np.zeros((subject.n_layers + 1, len(subject.text.names)))
    for batch in subject.batches():
        total += subject.remember(f"{name}-{batch.number:05d}", lambda batch=batch: score(batch))  # type: ignore[misc]
    return total
