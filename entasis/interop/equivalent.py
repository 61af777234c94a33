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
    shape, tensors = drawing.shape, dict(drawing.tensors)
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
        _pad_attention(tensors, i, shape, old, new)
        _pad_feedforward(tensors, i, shape, old, new)
    return Drawing(replace(shape, layers=tuple(layers)), tensors)


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


def _pad_attention(tensors: Tensors, i: int, shape: ModelShape, old: LayerShape, new: LayerShape) -> None:
    d, k, prefix = shape.d_model, shape.head_dim, f"blocks.{i}.attention"
    like = next(iter(tensors.values()))
    old_ratio = old.n_heads // old.n_kv_heads if old.n_heads else 0
    new_ratio = new.n_heads // new.n_kv_heads
    queries = [g * new_ratio + r for g in range(old.n_kv_heads) for r in range(old_ratio)]
    keys = list(range(old.n_kv_heads))
    places = {"query": (new.n_heads, queries), "key": (new.n_kv_heads, keys), "value": (new.n_kv_heads, keys)}
    # A full-width norm now takes its mean square over more numbers, of which the new ones are zero. Stretching what
    # it reads and shrinking its weight restores the result exactly, epsilon included.
    stretch = dict.fromkeys(places, 1.0)
    if shape.qk_norm == "full":
        stretch |= {part: math.sqrt(n / len(p)) for part, (n, p) in places.items() if part != "value" and p}
    for part, (count, place) in places.items():
        for kind in ("weight", "bias") if shape.qkv_bias else ("weight",):
            wide = like.new_zeros((count, k, d) if kind == "weight" else (count, k))
            if place:
                source = tensors[f"{prefix}.{part}.{kind}"]
                wide[place] = source.view(len(place), k, *source.shape[1:]) * stretch[part]
            tensors[f"{prefix}.{part}.{kind}"] = wide.flatten(0, 1)
    out = like.new_zeros(d, new.n_heads, k)
    if queries:
        out[:, queries] = tensors[f"{prefix}.output.weight"].view(d, len(queries), k)
    tensors[f"{prefix}.output.weight"] = out.flatten(1)
    if shape.attention_output_bias:
        tensors.setdefault(f"{prefix}.output.bias", like.new_zeros(d))
    for part, (count, place) in list(places.items())[:2]:
        name = f"{prefix}.{part}_norm.weight"
        if shape.qk_norm == "head":
            tensors.setdefault(name, like.new_ones(k))
        elif shape.qk_norm == "full":
            wide = like.new_zeros(count, k)
            if place:
                wide[place] = tensors[name].view(len(place), k) / stretch[part]
            tensors[name] = wide.flatten()
    _default_norm(tensors, f"blocks.{i}.attention_norm", shape, like)


def _pad_feedforward(tensors: Tensors, i: int, shape: ModelShape, old: LayerShape, new: LayerShape) -> None:
    d, prefix = shape.d_model, f"blocks.{i}.feedforward"
    like = next(iter(tensors.values()))
    for part in ("gate", "up") if shape.ffn == "swiglu" else ("up",):
        for kind in ("weight", "bias") if shape.ffn_bias else ("weight",):
            wide = like.new_zeros((new.d_ff, d) if kind == "weight" else (new.d_ff,))
            if old.d_ff:
                wide[: old.d_ff] = tensors[f"{prefix}.{part}.{kind}"]
            tensors[f"{prefix}.{part}.{kind}"] = wide
    down = like.new_zeros(d, new.d_ff)
    if old.d_ff:
        down[:, : old.d_ff] = tensors[f"{prefix}.down.weight"]
    tensors[f"{prefix}.down.weight"] = down
    if shape.ffn_bias:
        tensors.setdefault(f"{prefix}.down.bias", like.new_zeros(d))
    _default_norm(tensors, f"blocks.{i}.feedforward_norm", shape, like)


def _default_norm(tensors: Tensors, name: str, shape: ModelShape, like: torch.Tensor) -> None:
    tensors.setdefault(f"{name}.weight", like.new_ones(shape.d_model))
    if shape.norm_bias:
        tensors.setdefault(f"{name}.bias", like.new_zeros(shape.d_model))
