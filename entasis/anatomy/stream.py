"""One sweep up the column: the residual stream is carried, so that changing layer l runs only the layers above it.

Naively, the loss of a model without layer l, for every l, costs L forward passes. Here the clean stream x_l in front of
layer l is at hand when layer l's turn comes: the replacement is applied to it and the layers above are run, then the clean
layer l takes the stream to layer l + 1. That is L + L (L − 1) / 2 evaluations of a block instead of L², and as only one
clean stream is needed at a time, nothing has to be cached or spilled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from entasis.anatomy.subject import Subject
from entasis.anatomy.text import Batch
from entasis.evaluate.bits_per_byte import head_nll
from entasis.model.transformer import Transformer

Rotation = tuple[torch.Tensor, torch.Tensor] | None
Replacement = Callable[[torch.Tensor, Rotation], torch.Tensor]
"""(x_BTD, rotation) → x_BTD: what stands in for a layer."""
Span = tuple[Replacement, int]
"""A replacement, and how many layers it stands in for."""


def rotation_of(model: Transformer, batch: Batch) -> Rotation:
    """What the blocks need beside the stream."""
    return model.rotation(0, batch.tokens_BT.shape[1], batch.tokens_BT.device)


@torch.no_grad()
def climb(subject: Subject, batch: Batch) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(l, stream in front of layer l, stream behind it), [B, T, D] each, from the bottom up."""
    model, rotation = subject.model, rotation_of(subject.model, batch)
    x_BTD = model.embed(batch.tokens_BT)
    for index, block in enumerate(model.blocks):
        with subject.autocast():
            y_BTD = block(x_BTD, rotation)
        yield index, x_BTD, y_BTD
        x_BTD = y_BTD


@torch.no_grad()
def document_nll(subject: Subject, x_BTD: torch.Tensor, batch: Batch) -> np.ndarray:
    """float64 [documents]: nats that the head, reading this stream after its norm, needs for the batch's targets."""
    model, targets_N = subject.model, batch.targets_BT.flatten()
    with subject.autocast():
        nll_N = head_nll(model, model.norm(x_BTD).flatten(0, 1), targets_N)[targets_N != -100]
    return np.bincount(batch.owner_N, weights=nll_N.double().cpu().numpy(), minlength=len(subject.text.names))


@torch.no_grad()
def sweep(subject: Subject, name: str, replace: Callable[[int, Batch], Span | None]) -> np.ndarray:
    """float64 [L + 1, documents]: nats with layer l replaced, for each l; the last row is the clean model.

    `replace(l, batch)` gives what stands in for layer l; None where there is nothing (its row is NaN, as are those of
    layers that were not chosen). Each batch is remembered under `name`.
    """
    model, chosen = subject.model, subject.chosen

    def losses(batch: Batch) -> np.ndarray:
        rotation = rotation_of(model, batch)
        result = np.full((model.shape.n_layers + 1, len(subject.text.names)), np.nan)
        for layer, x_BTD, y_BTD in climb(subject, batch):
            if layer in chosen and (span := replace(layer, batch)):
                replacement, width = span
                with subject.autocast():
                    x_BTD = replacement(x_BTD, rotation)
                    for above in model.blocks[layer + width :]:
                        x_BTD = above(x_BTD, rotation)
                result[layer] = document_nll(subject, x_BTD, batch)
            top_BTD = y_BTD
        result[-1] = document_nll(subject, top_BTD, batch)
        return result

    total = np.zeros((model.shape.n_layers + 1, len(subject.text.names)))
    for batch in subject.batches():
        total += subject.remember(f"{name}-{batch.number:05d}", lambda batch=batch: losses(batch))  # type: ignore[misc]
    return total


def clean_nll(subject: Subject) -> np.ndarray:
    """float64 [documents]: nats of the whole model."""
    total = np.zeros(len(subject.text.names))
    for batch in subject.batches():
        for _, _, y_BTD in climb(subject, batch):
            top_BTD = y_BTD
        total += document_nll(subject, top_BTD, batch)
    return total
