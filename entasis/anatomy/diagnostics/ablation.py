"""Ablation: a layer is taken away, or replaced by something that knows less, and the loss is measured."""

from __future__ import annotations

from collections.abc import Callable

import torch

from entasis.anatomy.replacements import replacement
from entasis.anatomy.stream import Rotation, Span, climb
from entasis.anatomy.subject import Subject
from entasis.anatomy.substitutes import neighbour_average, skipped, weights_of, with_weights, without
from entasis.anatomy.text import Batch

Replace = Callable[[int, Batch], Span | None]


@replacement("skip", kind="ablation", says="the layer is left out")
def skip(subject: Subject) -> Replace:
    return lambda layer, batch: (skipped, 1)


@replacement("zero_attention", kind="ablation", says="the layer's attention is left out")
def zero_attention(subject: Subject) -> Replace:
    return _without(subject, "attention")


@replacement("zero_ffn", kind="ablation", says="the layer's FFN is left out")
def zero_ffn(subject: Subject) -> Replace:
    return _without(subject, "feedforward")


def _without(subject: Subject, part: str) -> Replace:
    halves = [without(subject.model, layer, part) for layer in range(subject.n_layers)]

    def replace(layer: int, batch: Batch) -> Span | None:
        half = halves[layer]
        return None if half is None else (half, 1)

    return replace


@replacement("half_ffn", kind="ablation", says="the second half of its FFN's hidden units is left out")
def half_ffn(subject: Subject) -> Replace:
    """FFN sensitivity: models trained with nested widths (MatFormer, 2310.07707) keep their loss, others need not."""

    def replace(layer: int, batch: Batch) -> Span | None:
        width = subject.shape.layers[layer].d_ff
        if width < 2:
            return None
        weights = weights_of(subject.model, layer)
        down = weights["feedforward.down.weight"].clone()
        down[:, width // 2 :] = 0
        return with_weights(subject.model, layer, {**weights, "feedforward.down.weight": down}), 1

    return replace


@replacement("neighbour_average", kind="ablation", says="the layer's weights are the mean of its neighbours'")
def average(subject: Subject) -> Replace:
    """The paper's ablation (2603.19348); at either end the one neighbour. A single layer has none."""
    if subject.n_layers == 1:
        return lambda layer, batch: None
    return lambda layer, batch: (
        with_weights(subject.model, layer, neighbour_average(subject.model, layer)),
        1,
    )


@replacement("mean_output", kind="ablation", says="the layer adds its mean update to every token")
def mean_output(subject: Subject) -> Replace:
    """What is lost beyond a constant: the mean is over all tokens of the same text."""
    shape = subject.shape
    total_LD = torch.zeros(shape.n_layers, shape.d_model, dtype=torch.float64)
    tokens = 0
    for batch in subject.batches():  # of the control the first only
        tokens += batch.tokens_BT.numel()
        for layer, x_BTD, y_BTD in climb(subject, batch):
            total_LD[layer] += (y_BTD - x_BTD).double().sum((0, 1)).cpu()
    mean_LD = (total_LD / tokens).to(subject.device)

    def replace(layer: int, batch: Batch) -> Span:
        return lambda x_BTD, rotation: x_BTD + mean_LD[layer].to(x_BTD.dtype), 1

    return replace


@replacement("swap", kind="ablation", says="the layer and the one above it change places")
def swap(subject: Subject) -> Replace:
    def replace(layer: int, batch: Batch) -> Span | None:
        if layer + 1 == subject.n_layers:
            return None
        lower, upper = subject.model.blocks[layer], subject.model.blocks[layer + 1]
        return lambda x_BTD, rotation: lower(upper(x_BTD, rotation), rotation), 2

    return replace


@replacement("noise", kind="ablation", says="the layer's update becomes noise of the same norm")
def noise(subject: Subject) -> Replace:
    """Tells an update's direction from its size; drawn anew for each token."""

    def replace(layer: int, batch: Batch) -> Span:
        block = subject.model.blocks[layer]

        def noisy(x_BTD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
            generator = subject.generator("noise", layer, batch.number)
            drawn_BTD = torch.randn(x_BTD.shape, generator=generator).to(x_BTD)
            norm_BT1 = (block(x_BTD, rotation) - x_BTD).norm(dim=-1, keepdim=True)
            return x_BTD + drawn_BTD * (norm_BT1 / drawn_BTD.norm(dim=-1, keepdim=True))

        return noisy, 1

    return replace
