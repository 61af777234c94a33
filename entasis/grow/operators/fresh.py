"""The operator whose new layers are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from entasis.grow.growth import OPERATORS, GrownLayer, Operator, kept
from entasis.grow.resize import Read, ResizePlan
from entasis.grow.transitions import Init
from entasis.shape.shapes import ModelShape, read_layers

if TYPE_CHECKING:
    import torch


@OPERATORS.register("append_random")
class AppendRandom(Operator):
    """`count` fresh layers on top (constructive training), with the initial values that the seed gives a model of the new
    depth at these places."""

    count: Annotated[int, Field(ge=1, le=1000)]
    layer: dict[str, Any] | None = None
    """Their shape, {n_heads, n_kv_heads, d_ff}; null: the last layer's."""

    def layers(self, shape: ModelShape) -> list[GrownLayer]:
        drawn = read_layers([self.layer])[0] if self.layer is not None else shape.layers[-1]
        fresh = GrownLayer(is_new=True, shape=drawn, made="all")
        return [*(kept(i) for i in range(shape.n_layers)), *[fresh] * self.count]

    def make(self, plan: ResizePlan, read: Read, init: Init) -> Iterator[tuple[str, torch.Tensor]]:
        like = read("norm.weight")
        for name, value in init.draw(plan.shape, filter(plan.is_new, plan.parameters)):
            yield name, value.to(like)
