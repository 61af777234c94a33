"""What can stand in for a layer: the same one with other weights, or with one half left out.

Layers may differ in shape. Where a neighbour's weights are needed in a layer of another shape, they are *resized*: its
heads (in KV groups) and hidden units are sorted by importance, the largest product of norms of what writes and reads
them first; then the last ones are cut off, or zeros are added. A neighbour without attention, or without FFN, gives zeros
there. Neighbours of equal shape are taken as they are.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.func import functional_call

from entasis.anatomy.stream import Replacement, Rotation
from entasis.errors import UserError
from entasis.grow import importance, resize
from entasis.model.transformer import Transformer

Weights = dict[str, torch.Tensor]
"""A block's parameters by their name within the block."""


def weights_of(model: Transformer, layer: int) -> Weights:
    """The block's parameters, detached; not copies."""
    return {name: p.detach() for name, p in model.blocks[layer].named_parameters()}


def matrices(weights: Weights) -> Weights:
    """Those that are matrices: the projections, without norms and biases."""
    return {name: w for name, w in weights.items() if w.ndim == 2}


def with_weights(model: Transformer, layer: int, weights: Weights) -> Replacement:
    """The layer with other weights; the model is not changed."""
    block = model.blocks[layer]
    return lambda x_BTD, rotation: functional_call(block, weights, (x_BTD, rotation))


def without(model: Transformer, layer: int, part: str) -> Replacement | None:
    """The layer without its `attention` or `feedforward`; None where it has none."""
    block = model.blocks[layer]
    if getattr(block, part) is None:
        return None
    half = copy.copy(block)
    half._modules = {**block._modules, part: None}  # the original keeps its own mapping
    return half


def skipped(x_BTD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """The layer left out."""
    return x_BTD


def neighbours(n_layers: int, layer: int) -> list[int]:
    """The layers directly below and above; one at either end."""
    return [i for i in (layer - 1, layer + 1) if 0 <= i < n_layers]


def neighbour_average(model: Transformer, layer: int) -> Weights:
    """The mean of the neighbours' weights in this layer's shape. Raises `UserError` where KV groups differ in size."""
    own = weights_of(model, layer)
    near = [fitted(model, i, layer) for i in neighbours(model.shape.n_layers, layer)]
    # What a neighbour lacks entirely (its norm, when it has no such half) is taken from the layer itself.
    return {name: torch.stack([n.get(name, w) for n in near]).mean(0) for name, w in own.items()}


def fitted(model: Transformer, source: int, layer: int) -> Weights:
    """The weights of layer `source` in the shape of `layer`."""
    shape = model.shape
    there, here, weights = shape.layers[source], shape.layers[layer], weights_of(model, source)
    if there == here:
        return weights
    if there.n_heads and here.n_heads and there.n_heads * here.n_kv_heads != here.n_heads * there.n_kv_heads:
        raise UserError(
            f"neighbour_average: {there.n_heads} heads on {there.n_kv_heads} KV heads cannot stand in for "
            f"{here.n_heads} on {here.n_kv_heads}: the groups differ in size; leave this measure out"
        )
    order = importance.order_by_norm(weights, shape, there)
    plan = resize.plan(shape, [here], sources=[source], orders={source: order})
    of_block = {name.removeprefix("blocks.0."): entry for name, entry in plan.parameters.items()}
    result = {}
    for name, own in weights_of(model, layer).items():
        entry = of_block[name]
        # A half that the neighbour lacks is zero; its norms then have no value of their own.
        if entry.source is not None or "_norm" not in name:
            old = None if entry.source is None else weights[entry.source.removeprefix(f"blocks.{source}.")]
            result[name] = entry.make(old, own)
    return result


def changed_copy(model: Transformer, changes: dict[int, Weights]) -> Transformer:
    """A copy of the model with other weights in some layers; what does not change is shared."""
    result = copy.copy(model)
    result._modules = {**model._modules, "blocks": nn.ModuleList(model.blocks)}
    for layer, weights in changes.items():
        block = copy.deepcopy(model.blocks[layer])
        block.load_state_dict(weights)
        result.blocks[layer] = block
    return result
