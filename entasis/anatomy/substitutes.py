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
from entasis.model.transformer import Transformer
from entasis.shape.shapes import LayerShape, ModelShape

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
    result = {name: w for name, w in weights.items() if "_norm" in name}
    if here.n_heads:
        result |= _resize(_heads(weights, shape, there), _heads_taken(weights, shape, there, here))
    if here.d_ff:
        result |= _resize(_units(weights, there), _units_taken(weights, there, here))
    own = weights_of(model, layer)
    # A half that the neighbour lacks is zero; its full-width query and key norms cannot be resized without a meaning.
    missing = [n for n in own if n not in result and "_norm" not in n]
    return {
        **{n: torch.zeros_like(own[n]) for n in missing},
        **{n: w for n, w in result.items() if n in own and w.shape == own[n].shape},
    }


Axes = list[tuple[str, torch.Tensor, int | None]]
"""Name, tensor, and the axis along which it has heads' features or hidden units (None: neither)."""


def _heads(weights: Weights, shape: ModelShape, layer: LayerShape) -> Axes:
    if not layer.n_heads:
        return []
    axes = {"query": 0, "key": 0, "value": 0, "output": 1}
    return [
        (n, w, None if n == "attention.output.bias" else min(axes[n.split(".")[1]], w.ndim - 1))
        for n, w in weights.items()
        if n.startswith("attention.") and "_norm" not in n
    ]


def _units(weights: Weights, layer: LayerShape) -> Axes:
    axes = {"gate": 0, "up": 0, "down": 1}
    return [
        (n, w, None if n == "feedforward.down.bias" else min(axes[n.split(".")[1]], w.ndim - 1))
        for n, w in weights.items()
        if n.startswith("feedforward.")
    ]


Taken = dict[str, tuple[torch.Tensor, int]]
"""For a projection: the features taken, in order, and how many the target has (zeros fill up)."""


def _heads_taken(weights: Weights, shape: ModelShape, there: LayerShape, here: LayerShape) -> Taken:
    if not there.n_heads:
        return {}
    group = here.n_heads // here.n_kv_heads
    if there.n_heads // there.n_kv_heads != group:
        raise UserError(
            f"neighbour_average: {there.n_heads} heads on {there.n_kv_heads} KV heads cannot stand in for "
            f"{here.n_heads} on {here.n_kv_heads}: the groups differ in size; leave this measure out"
        )
    k = shape.head_dim
    value = weights["attention.value.weight"].view(there.n_kv_heads, k, -1).flatten(1).norm(dim=1)
    output = weights["attention.output.weight"].T.reshape(there.n_kv_heads, -1).norm(dim=1)
    best = (value * output).argsort(descending=True)[: here.n_kv_heads]
    step = torch.arange(k, device=best.device)
    kv = (best[:, None] * k + step).flatten()
    wide = torch.arange(k * group, device=best.device)
    q = (best[:, None] * (k * group) + wide).flatten()
    sizes = {"q": here.n_heads * k, "kv": here.n_kv_heads * k}
    return {
        "query": (q, sizes["q"]),
        "output": (q, sizes["q"]),
        "key": (kv, sizes["kv"]),
        "value": (kv, sizes["kv"]),
    }


def _units_taken(weights: Weights, there: LayerShape, here: LayerShape) -> Taken:
    if not there.d_ff:
        return {}
    reading = weights["feedforward.up.weight"].norm(dim=1)
    if "feedforward.gate.weight" in weights:
        reading = reading * weights["feedforward.gate.weight"].norm(dim=1)
    best = (reading * weights["feedforward.down.weight"].norm(dim=0)).argsort(descending=True)[: here.d_ff]
    return dict.fromkeys(("gate", "up", "down"), (best, here.d_ff))


def _resize(axes: Axes, taken: Taken) -> Weights:
    result = {}
    for name, tensor, axis in axes:
        if axis is None:
            result[name] = tensor
            continue
        chosen, size = taken[name.split(".")[1]]
        kept = tensor.index_select(axis, chosen)
        padding = list(kept.shape)
        padding[axis] = size - len(chosen)
        result[name] = torch.cat([kept, kept.new_zeros(padding)], dim=axis)
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
