"""Which heads and FFN units of a layer matter most, by its weights alone: what `narrow` keeps.

A score is one registered function `(weights, shape, layer) -> Order`, best first; `weights` are the layer's parameters by
their names within the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from entasis.grow.resize import Order
from entasis.registry import Registry
from entasis.shape.shapes import LayerShape, ModelShape

if TYPE_CHECKING:
    import torch

Score = Callable[[Mapping[str, "torch.Tensor"], ModelShape, LayerShape], Order]
SCORES: Registry[Score] = Registry("grow: importance")


@SCORES.register("norm")
def order_by_norm(weights: Mapping[str, torch.Tensor], shape: ModelShape, layer: LayerShape) -> Order:
    """KV groups, query heads of a group and FFN units by the product of the norms of what writes and what reads them, largest
    first."""
    groups = heads = units = None
    if layer.n_heads:
        query = weights["attention.query.weight"].view(
            layer.n_kv_heads, layer.n_heads // layer.n_kv_heads, -1
        )
        read = weights["attention.output.weight"].T.reshape((*query.shape[:2], -1))
        heads = (query.norm(dim=2) * read.norm(dim=2)).argsort(dim=1, descending=True).tolist()
        value = weights["attention.value.weight"].view(layer.n_kv_heads, shape.head_dim, -1).flatten(1)
        output = weights["attention.output.weight"].T.reshape(layer.n_kv_heads, -1)
        groups = (value.norm(dim=1) * output.norm(dim=1)).argsort(descending=True).tolist()
    if layer.d_ff:
        written = [w for n, w in weights.items() if n in ("feedforward.gate.weight", "feedforward.up.weight")]
        score = weights["feedforward.down.weight"].norm(dim=0)
        for w in written:
            score = score * w.norm(dim=1)
        units = score.argsort(descending=True).tolist()
    return Order(groups, heads, units)


@SCORES.register("first")
def order_as_it_stands(weights: Mapping[str, torch.Tensor], shape: ModelShape, layer: LayerShape) -> Order:
    """The first groups and units stay: takes off what was added behind them."""
    return Order()
