"""Operators whose new layers lie between their two neighbours. Heads and FFN units are taken as they stand; the aligned
operators match them first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from entasis.grow import positions
from entasis.grow.growth import OPERATORS, GrownLayer, Operator, insert
from entasis.grow.positions import Positions
from entasis.grow.resize import Read, ResizePlan
from entasis.grow.transitions import Init
from entasis.shape.shapes import ModelShape

if TYPE_CHECKING:
    import torch


@OPERATORS.register("average")
class Average(Operator):
    """Between layers i and i+1 the mean of the two, parameter by parameter."""

    after: Positions

    def layers(self, shape: ModelShape) -> list[GrownLayer]:
        places = positions.resolve(self.after, shape.n_layers, between=True, where="grow: average")
        return insert(shape, {i: GrownLayer(((i, 0.5), (i + 1, 0.5)), is_new=True) for i in places})


@OPERATORS.register("zero_average")
class ZeroAverage(Operator):
    """The mean of layers i and i+1 with output projections of 0 (OpT-DeUS without its transport). With reordered norms it is
    the norms' weights that are 0."""

    keeps_function: ClassVar[bool] = True
    after: Positions

    def layers(self, shape: ModelShape) -> list[GrownLayer]:
        places = positions.resolve(self.after, shape.n_layers, between=True, where="grow: zero_average")
        return insert(
            shape, {i: GrownLayer(((i, 0.5), (i + 1, 0.5)), is_new=True, output=0.0) for i in places}
        )


@OPERATORS.register("interpolate")
class Interpolate(Operator):
    """Between layers i and i+1 the point at `t` of the way (0 is layer i): (1−t)·Wᵢ + t·Wᵢ₊₁, or along the arc between them."""

    after: Positions
    t: Annotated[float, Field(ge=0, le=1)] = 0.5
    method: Literal["linear", "slerp"] = "linear"
    """`slerp`: matrices, each as one long vector, along the arc (norms and biases stay linear)."""

    def layers(self, shape: ModelShape) -> list[GrownLayer]:
        places = positions.resolve(self.after, shape.n_layers, between=True, where="grow: interpolate")
        made: Literal["none", "matrices"] = "matrices" if self.method == "slerp" else "none"
        shares = ((0, 1 - self.t), (1, self.t))
        return insert(
            shape,
            {i: GrownLayer(tuple((i + k, x) for k, x in shares), is_new=True, made=made) for i in places},
        )

    def make(self, plan: ResizePlan, read: Read, init: Init) -> Iterator[tuple[str, torch.Tensor]]:
        for name, entry in plan.parameters.items():
            if entry.fill is None and not entry.sources:
                _, index, inside = name.split(".", 2)
                first, second = plan.layers[int(index)].sources
                yield name, slerp(read(f"blocks.{first}.{inside}"), read(f"blocks.{second}.{inside}"), self.t)


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """The point at `t` of the arc from a to b, each taken as one vector; its length is interpolated too.

    Vectors less than 1e-4 apart in angle, or one of them 0, are interpolated on the line.
    """
    import torch

    x, y = (
        a.to(torch.promote_types(a.dtype, torch.float32)),
        b.to(torch.promote_types(b.dtype, torch.float32)),
    )
    lengths = x.norm(), y.norm()
    line = torch.lerp(x, y, t)
    if not all(lengths):
        return line.to(a.dtype)
    angle = torch.arccos((x.flatten() @ y.flatten() / (lengths[0] * lengths[1])).clamp(-1, 1))
    if angle < 1e-4 or torch.pi - angle < 1e-4:
        return line.to(a.dtype)
    parts = torch.sin((1 - t) * angle) * x / lengths[0] + torch.sin(t * angle) * y / lengths[1]
    return (parts / torch.sin(angle) * torch.lerp(*lengths, t)).to(a.dtype)
