"""Ablation: a layer is left out, or replaced by one that knows less."""

from __future__ import annotations

import copy

import torch
from torch import nn

from entasis.anatomy.interventions import Change, Layer, intervention
from entasis.anatomy.layer_sweep import walk_layers
from entasis.anatomy.layer_weights import average_neighbours, have_neighbours
from entasis.anatomy.subject import Subject
from entasis.model.rotary import Rotation
from entasis.shape.shapes import ModelShape


@intervention("skip", kind="ablation", says="the layer is left out")
def skip(layer: Layer) -> Change:
    return lambda x_BTD, rotation: x_BTD


@intervention("zero_attention", kind="ablation", says="the layer's attention is left out")
def zero_attention(layer: Layer) -> Change:
    return drop_half(layer.block, "attention")


@intervention("zero_ffn", kind="ablation", says="the layer's FFN is left out")
def zero_ffn(layer: Layer) -> Change:
    return drop_half(layer.block, "feedforward")


def drop_half(block: nn.Module, part: str) -> nn.Module | None:
    """The layer without its `attention` or `feedforward`; None where it has none."""
    if getattr(block, part) is None:
        return None
    half = copy.copy(block)
    half._modules = {**block._modules, part: None}  # the original keeps its own mapping
    return half


@intervention("half_ffn", kind="ablation", says="the second half of its FFN's hidden units is left out")
def half_ffn(layer: Layer) -> Change:
    """FFN sensitivity: models trained with nested widths (MatFormer, 2310.07707) keep their loss, others need not."""
    width = layer.subject.shape.layers[layer.index].d_ff
    if width < 2:
        return None
    down = layer.weights["feedforward.down.weight"].clone()
    down[:, width // 2 :] = 0
    return {"feedforward.down.weight": down}


def lacks_neighbours(shape: ModelShape) -> str | None:
    """Why no layer of the shape can be the mean of its neighbours; None where one can."""
    if any(have_neighbours(shape, i) for i in range(shape.n_layers)):
        return None
    return "no layer has neighbours whose KV groups are of its own size"


@intervention(
    "neighbour_average",
    kind="ablation",
    says="the layer's weights are the mean of its neighbours'",
    lacks=lacks_neighbours,
)
def neighbour_average(layer: Layer) -> Change:
    """The paper's ablation (2603.19348); at either end the one neighbour."""
    return average_neighbours(layer.model, layer.index)


def mean_updates(subject: Subject) -> torch.Tensor:
    """[L, D]: what each layer adds to the residual stream, mean over the subject's tokens."""
    total_LD = torch.zeros(subject.n_layers, subject.shape.d_model, dtype=torch.float64)
    tokens = 0
    for batch in subject.batches():  # of the control the first only
        tokens += batch.tokens_BT.numel()
        for layer, x_BTD, y_BTD in walk_layers(subject, batch):
            total_LD[layer] += (y_BTD - x_BTD).double().sum((0, 1)).cpu()
    return (total_LD / tokens).to(subject.device)


@intervention(
    "mean_output", kind="ablation", says="the layer adds its mean update to every token", prepare=mean_updates
)
def mean_output(layer: Layer) -> Change:
    """What is lost beyond a constant: the mean is over all tokens of the same text."""
    return lambda x_BTD, rotation: x_BTD + layer.prepared[layer.index].to(x_BTD.dtype)


@intervention("swap", kind="ablation", says="the layer and the one above it change places", layers=2)
def swap(layer: Layer) -> Change:
    lower, upper = layer.model.blocks[layer.index], layer.model.blocks[layer.index + 1]
    return lambda x_BTD, rotation: lower(upper(x_BTD, rotation), rotation)


@intervention("noise", kind="ablation", says="the layer's update becomes noise of the same norm")
def noise(layer: Layer) -> Change:
    """Tells an update's direction from its size; drawn anew for each token."""

    def add_noise(x_BTD: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        drawn_BTD = torch.randn(x_BTD.shape, generator=layer.generator("noise", layer.batch.number)).to(x_BTD)
        norm_BT1 = (layer.block(x_BTD, rotation) - x_BTD).norm(dim=-1, keepdim=True)
        return x_BTD + drawn_BTD * (norm_BT1 / drawn_BTD.norm(dim=-1, keepdim=True))

    return add_noise
