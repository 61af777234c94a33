"""The same function in another drawing: scales folded into weights, missing halves as zeros, layers padded.

Engines know no LayerNorm scaling, residual or logit scale, no layer without attention, and mostly no layers that
differ. Each step here changes shape and weights together and leaves the logits as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from entasis.errors import UserError
from entasis.grow import resize
from entasis.shape import fields
from entasis.shape.shapes import LayerShape, ModelShape

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Drawing:
    """A shape and its weights, by our parameter names."""

    shape: ModelShape
    tensors: Tensors


def folded(drawing: Drawing) -> Drawing:
    """All scales moved into weights: norm_scaling, residual_scale, attention_scale, logit_scale are neutral after."""
    shape, tensors = drawing.shape, dict(drawing.tensors)

    def scale(name: str, factor: float) -> None:
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in tensors and factor != 1.0:
                tensors[f"{name}.{kind}"] = tensors[f"{name}.{kind}"] * factor

    query = (shape.attention_scale or 1 / math.sqrt(shape.head_dim)) * math.sqrt(shape.head_dim)
    for i in range(shape.n_layers):
        norm = 1 / math.sqrt(i + 1) if shape.norm_scaling else 1.0
        for half, out in (("attention", "attention.output"), ("feedforward", "feedforward.down")):
            if shape.norm_placement == "reordered":
                scale(f"blocks.{i}.{half}_norm", norm * shape.residual_scale)
            else:
                scale(f"blocks.{i}.{half}_norm", norm)
                scale(f"blocks.{i}.{out}", shape.residual_scale)
        normed = shape.qk_norm != "none"
        scale(f"blocks.{i}.attention.query{'_norm' if normed else ''}", query)
    scale("norm", shape.logit_scale)
    if "head.bias" in tensors:
        tensors["head.bias"] = tensors["head.bias"] * shape.logit_scale
    neutral = replace(shape, norm_scaling=False, residual_scale=1.0, attention_scale=None, logit_scale=1.0)
    return Drawing(neutral, tensors)


def padded(drawing: Drawing, layers: list[LayerShape]) -> Drawing:
    """Every layer widened to the given one; the new heads and FFN units are zero and change nothing.

    Query heads stay with their KV head: the one of group g and place r goes to g · R + r, R the new heads per group.
    A missing half becomes one of zeros. Raises `UserError` for a layer that would have to shrink.
    """
    shape = drawing.shape
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
    return Drawing(plan.shape, dict(resize.apply(plan, drawing.tensors)))


def widest(shape: ModelShape, valid: Callable[[int], bool] = lambda heads: True) -> LayerShape:
    """The smallest equal layer that holds every layer of `shape` and whose number of heads is `valid`.

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
        if valid(heads):
            fitting = [(heads, g) for g in range(groups, heads // ratio + 1) if heads % g == 0]
            best = min([*fitting[:1], *([best] if best else [])], key=sum, default=None)
    if best is None:
        raise UserError(f"no number of heads from {least} upwards divides d_model {shape.d_model}")
    return LayerShape(*best, max(1, *(x.d_ff for x in shape.layers)))
