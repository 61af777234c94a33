"""Shape and weights changed together so that the logits stay: scales folded, halves and biases of zeros, padded layers.

Engines know no LayerNorm scaling, residual or logit scale, no layer without attention, and mostly no layers that
differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from entasis.errors import UserError
from entasis.grow import resize
from entasis.shape import fields, layout
from entasis.shape.shapes import LayerShape, ModelShape

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ShapedWeights:
    """A shape and its weights, by our parameter names."""

    shape: ModelShape
    tensors: Tensors


def fold_scales(weights: ShapedWeights) -> ShapedWeights:
    """Moves all scales into weights: norm_scaling, residual_scale, attention_scale, logit_scale are neutral after."""
    shape, tensors = weights.shape, dict(weights.tensors)
    for p in layout.parameters(shape):
        factor = _scale_of(shape, p)
        if p.shares is None and factor != 1.0:
            tensors[p.name] = tensors[p.name] * factor
    neutral = replace(shape, norm_scaling=False, residual_scale=1.0, attention_scale=None, logit_scale=1.0)
    return ShapedWeights(neutral, tensors)


def _scale_of(shape: ModelShape, p: layout.Parameter) -> float:
    """The factor that the shape's scales put on one parameter."""
    reordered = shape.norm_placement == "reordered"
    if p.role in ("attention_norm", "feedforward_norm"):
        assert p.layer is not None
        norm = 1 / math.sqrt(p.layer + 1) if shape.norm_scaling else 1.0
        return norm * shape.residual_scale if reordered else norm
    if p.part in ("attention", "feedforward") and p.axes[0] == "residual":
        return 1.0 if reordered else shape.residual_scale
    if p.role == ("query" if shape.qk_norm == "none" else "query_norm"):
        root = math.sqrt(shape.head_dim)
        return (shape.attention_scale or 1 / root) * root
    if p.role == "final_norm" or (p.role == "head" and p.is_bias):
        return shape.logit_scale
    return 1.0


def pad_layers(weights: ShapedWeights, layers: list[LayerShape]) -> ShapedWeights:
    """Widens every layer to the given one; the new heads and FFN units are zero and change nothing.

    Query heads stay with their KV head: the one of group g and place r goes to g · R + r, R the new heads per group.
    A missing half becomes one of zeros. Raises `UserError` for a layer that would have to shrink.
    """
    shape = weights.shape
    fields.require([*shape.layers, *layers], "padding")
    for i, (old, new) in enumerate(zip(shape.layers, layers, strict=True)):
        if old == new:
            continue
        ratio = new.n_heads // new.n_kv_heads
        if (
            old.n_kv_heads > new.n_kv_heads
            or old.d_ff > new.d_ff
            or (old.n_heads and old.n_heads // old.n_kv_heads > ratio)
        ):
            raise UserError(f"layer {i}: {old} does not fit into {new}")
    plan = resize.plan(shape, layers)
    return ShapedWeights(plan.shape, dict(resize.apply(plan, weights.tensors)))


def fill_missing_halves(weights: ShapedWeights, d_ff: int) -> ShapedWeights:
    """Gives a layer without attention one head of zeros, and a layer without FFN `d_ff` units of zeros."""
    filled = [LayerShape(x.n_heads or 1, x.n_kv_heads or 1, x.d_ff or d_ff) for x in weights.shape.layers]
    return pad_layers(weights, filled)


def fill_biases(weights: ShapedWeights, *fields_of_shape: str) -> ShapedWeights:
    """Gives what these fields of a shape name (`qkv_bias`, `ffn_bias`) biases of zeros where it has none."""
    given: dict[str, Any] = dict.fromkeys(fields_of_shape, True)
    shape = replace(weights.shape, **given)
    like = weights.tensors["norm.weight"]
    sizes = layout.sizes(shape)
    missing = {name: like.new_zeros(size) for name, size in sizes.items() if name not in weights.tensors}
    return ShapedWeights(shape, {**weights.tensors, **missing})


def find_widest(shape: ModelShape, is_valid: Callable[[int], bool] = lambda heads: True) -> LayerShape:
    """The smallest equal layer that holds every layer of `shape` and whose number of heads is valid.

    Both the number of KV heads and the query heads of each may grow. Raises `UserError` when no number of heads up to
    d_model (or four times the widest layer's, whichever is more) is valid.
    """
    attending = [x for x in shape.layers if x.n_heads]
    groups = max((x.n_kv_heads for x in attending), default=1)
    ratio = max((x.n_heads // x.n_kv_heads for x in attending), default=1)
    least = groups * ratio
    best: tuple[int, int] | None = None
    for heads in range(least, max(4 * least, shape.d_model) + 1):
        if best and heads + groups >= sum(best):
            break
        if is_valid(heads):
            fitting = [(heads, g) for g in range(groups, heads // ratio + 1) if heads % g == 0]
            best = min([*fitting[:1], *([best] if best else [])], key=sum, default=None)
    if best is None:
        raise UserError(f"no number of heads from {least} upwards divides d_model {shape.d_model}")
    return LayerShape(*best, max(1, *(x.d_ff for x in shape.layers)))
