"""Operators that leave the number of layers and change their heads and FFN widths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from entasis.configuration import HERE
from entasis.errors import UserError
from entasis.grow import growth, resize
from entasis.grow.growth import OPERATORS, GrownLayer, Operator
from entasis.grow.importance import SCORES
from entasis.grow.resize import AxisMap, Read, ResizePlan
from entasis.grow.transitions import Init
from entasis.registry import advise
from entasis.shape import layout
from entasis.shape.shapes import LayerShape, ModelShape, read_layers

if TYPE_CHECKING:
    import torch


def _known(name: str) -> str:
    if name not in SCORES:
        raise UserError(f"{HERE} is {name!r}; {advise(name, SCORES)}")
    return name


@OPERATORS.register("reshape")
class Reshape(Operator):
    """Every layer gets the widths of its own in `target`, some more and some less: `widen` and `narrow` in one."""

    target: list[dict[str, Any]] | None = None
    """The new layers, each {n_heads, n_kv_heads, d_ff}; or, instead, for all layers alike:"""
    n_heads: int | None = None
    n_kv_heads: int | None = None
    d_ff: int | None = None
    new_units: Literal["copies", "zeros"] = "copies"
    """Zeros are for serving: no gradient reaches them."""
    noise: Annotated[float, Field(ge=0, le=10)] = 0.5
    """Copies would learn the same for ever. What reads a unit is shared out among its copies with random numbers that cancel,
    of this size beside the weights' own; 0 shares evenly."""
    importance: Annotated[str, AfterValidator(_known)] = "norm"
    """What is kept where a layer gets narrower, see `entasis.grow.importance`."""

    def layers(self, shape: ModelShape) -> list[GrownLayer]:
        where = f"grow: {growth.name_of(self)}"
        names = ("n_heads", "n_kv_heads", "d_ff")
        widths = {name: value for name in names if (value := getattr(self, name)) is not None}
        if bool(widths) == (self.target is not None):
            raise UserError(f"{where}: give target (a list of layers), or n_heads, n_kv_heads, d_ff for all")
        if self.target is None:
            wanted = tuple(dataclasses.replace(layer, **widths) for layer in shape.layers)
        else:
            wanted = read_layers(self.target)
        if len(wanted) != shape.n_layers:
            raise UserError(
                f"{where}: target has {len(wanted)} layers and the model {shape.n_layers}; "
                "another operator changes their number"
            )
        for i, (old, new) in enumerate(zip(shape.layers, wanted, strict=True)):
            self.check(f"{where}: layer {i}", old, new)
        return [
            GrownLayer(((i, 1.0),), shape=new if new != shape.layers[i] else None)
            for i, new in enumerate(wanted)
        ]

    def computes_the_same(self, shape: ModelShape) -> bool:
        grown = zip(shape.layers, self.plan(shape).shape.layers, strict=True)
        return not any(_narrower(old, new) for old, new in grown)

    def check(self, where: str, old: LayerShape, new: LayerShape) -> None:
        """Raises `UserError`, which begins with `where`, for what is not this operator's to do."""

    def plan(self, shape: ModelShape) -> ResizePlan:
        return growth.compose(shape, self.layers(shape), growth.name_of(self), new_units=self.new_units)

    def settle(self, plan: ResizePlan, read: Read, shape: ModelShape) -> ResizePlan:
        orders = {}
        for i, (old, new) in enumerate(zip(shape.layers, plan.shape.layers, strict=True)):
            if _narrower(old, new):
                own = {
                    p.name.removeprefix(f"blocks.{i}."): read(p.name).float()
                    for p in layout.layer_parameters(shape, i)
                }
                orders[i] = SCORES[self.importance](own, shape, old)
        return growth.compose(
            shape, self.layers(shape), growth.name_of(self), orders=orders, new_units=self.new_units
        )

    def weights(self, plan: ResizePlan, read: Read, init: Init) -> Iterator[tuple[str, torch.Tensor]]:
        reading = {p.name for p in layout.parameters(plan.shape) if p.is_matrix and p.axes[0] == "residual"}
        for name, x in resize.apply(plan, read):
            axis = plan.parameters[name].axes[-1:]
            shared = name in reading and self.new_units == "copies" and self.noise and axis and axis[0]
            yield name, _share_unevenly(x, axis[0], self.noise, init.seed, name) if shared else x


@OPERATORS.register("widen")
class Widen(Reshape):
    """More query heads, KV groups and FFN units: copies of those there are, with what reads them shared out (Net2Net,
    1511.05641), or zeros. The model computes the same."""

    keeps_function: ClassVar[bool] = True

    def check(self, where: str, old: LayerShape, new: LayerShape) -> None:
        if _narrower(old, new):
            raise UserError(f"{where}: target is narrower than the layer; use narrow, or reshape for both")


@OPERATORS.register("narrow")
class Narrow(Reshape):
    """Fewer KV groups, query heads of a group and FFN units: the ones that `importance` ranks first."""

    def check(self, where: str, old: LayerShape, new: LayerShape) -> None:
        if _narrower(new, old):
            raise UserError(f"{where}: target is wider than the layer; use widen, or reshape for both")


def _narrower(old: LayerShape, new: LayerShape) -> bool:
    """Whether anything of the old layer is cut."""
    ratio = [x.n_heads // x.n_kv_heads if x.n_heads else 0 for x in (old, new)]
    return new.n_kv_heads < old.n_kv_heads or ratio[1] < ratio[0] or new.d_ff < old.d_ff


def _share_unevenly(
    x: torch.Tensor, axis: AxisMap | None, noise: float, seed: int, name: str
) -> torch.Tensor:
    """Adds to the columns that copies of one unit are read by random numbers that sum to zero over the copies.

    Their root mean square is `noise` times the column's own.
    """
    import numpy as np
    import torch

    from entasis.model.initialisation import draw_normal

    assert axis is not None, "its columns have been mapped"
    _, unit = np.unique(axis.source, return_inverse=True)
    units = torch.from_numpy(unit).to(x.device)
    counts = torch.bincount(units)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    drawn = draw_normal(tuple(x.shape), seed, f"{name}/copies").to(wide)
    drawn *= wide.square().mean(dim=0).sqrt() * noise
    total = torch.zeros(len(x), len(counts), dtype=wide.dtype, device=x.device).index_add_(1, units, drawn)
    # Alone, a unit's random numbers are their own mean: nothing is added.
    return (wide + drawn - (total / counts)[:, units]).to(x.dtype)
