"""Weights of single layers: read, resized to another layer's shape, averaged, put into a copy of the model.

Layers may differ in shape. Where a neighbour's weights are needed in a layer of another shape, its heads (in KV groups)
and FFN units are sorted by importance (`entasis.grow.importance`), then cut off or filled up with zeros
(`entasis.grow.resize`). A neighbour without attention, or without FFN, gives zeros there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from entasis.grow import importance, resize
from entasis.model.transformer import Transformer
from entasis.shape.shapes import ModelShape

Weights = dict[str, torch.Tensor]
"""A block's parameters by their names within the block."""


def read_weights(model: Transformer, layer: int) -> Weights:
    """The block's parameters, detached; not copies."""
    return {name: p.detach() for name, p in model.blocks[layer].named_parameters()}


def read_matrices(model: Transformer, layer: int) -> Weights:
    """The block's projections, without norms and biases."""
    return {name: w for name, w in read_weights(model, layer).items() if w.ndim == 2}


def have_neighbours(shape: ModelShape, layer: int) -> bool:
    """Whether a layer has neighbours, and all of them weights that fit it: KV groups of another size do not."""
    here, near = shape.layers[layer], [shape.layers[i] for i in _near(shape, layer)]
    return bool(near) and all(
        there.n_heads * here.n_kv_heads == here.n_heads * there.n_kv_heads
        for there in near
        if there.n_heads and here.n_heads
    )


def average_neighbours(model: Transformer, layer: int) -> Weights | None:
    """The mean of the weights directly below and above, in this layer's shape; at either end the one neighbour's.

    None for a layer that has none which fit.
    """
    if not have_neighbours(model.shape, layer):
        return None
    near = [fit_weights(model, i, layer) for i in _near(model.shape, layer)]
    # What a neighbour lacks entirely (its norm, when it has no such half) is taken from the layer itself.
    own = read_weights(model, layer)
    return {name: torch.stack([n.get(name, w) for n in near]).mean(0) for name, w in own.items()}


def _near(shape: ModelShape, layer: int) -> list[int]:
    return [i for i in (layer - 1, layer + 1) if 0 <= i < shape.n_layers]


def fit_weights(model: Transformer, source: int, layer: int) -> Weights:
    """The weights of layer `source` in the shape of `layer`, whose KV groups are of the same size."""
    shape = model.shape
    there, here, weights = shape.layers[source], shape.layers[layer], read_weights(model, source)
    if there == here:
        return weights
    order = importance.order_by_norm(weights, shape, there)
    resized = resize.plan(shape, [here], sources=[source], orders={source: order}).parameters
    result = {}
    for name, own in read_weights(model, layer).items():
        entry = resized[f"blocks.0.{name}"]
        # A half that the neighbour lacks is zero; its norms then have no value of their own.
        if entry.source is not None or "_norm" not in name:
            old = None if entry.source is None else weights[entry.source.removeprefix(f"blocks.{source}.")]
            result[name] = entry.make(old, own)
    return result


def copy_with_weights(model: Transformer, changes: dict[int, Weights]) -> Transformer:
    """A copy of the model with other weights in some layers; unchanged layers are shared."""
    result = copy.copy(model)
    result._modules = {**model._modules, "blocks": nn.ModuleList(model.blocks)}
    for layer, weights in changes.items():
        block = copy.deepcopy(model.blocks[layer])
        block.load_state_dict(block.state_dict() | weights)
        result.blocks[layer] = block
    return result


@contextmanager
def only_trainable(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within, these of the model's parameters require a gradient and the others do not."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)
