"""Operators that leave the number of layers and change their heads and FFN widths."""

from __future__ import annotations

import dataclasses
import math
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
    """Zeros are for serving: no gradient reaches them. With copies, a half that a layer had not is drawn, and silent at first."""
    noise: Annotated[float, Field(ge=0, le=10)] = 0.5
    """Copies would learn the same for ever. What reads a unit is shared out among its copies with random numbers that cancel,
    of this size beside the weights' own; 0 shares evenly. In bf16 and fp16 no share is more than about twice what is shared
    out, so that all of them add up to it to the bit."""
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
        dataclasses.replace(shape, layers=wanted)  # is valid, or refused by name
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

    def memory(self, shape: ModelShape) -> int:
        # The matrix as it is stored, mapped and shared out, its random numbers, and the sums of some rows.
        entries = self.plan(shape).parameters.values()
        shared = [x.size for x in entries if x.axes and x.axes[-1] and x.axes[-1].is_shared]
        return max((10 * math.prod(size) + 64 * _ROWS * size[-1] for size in shared), default=0)

    def weights(self, plan: ResizePlan, read: Read, init: Init) -> Iterator[tuple[str, torch.Tensor]]:
        return carry_out(plan, read, init, self.noise)


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
        if new.n_kv_heads > old.n_kv_heads or _ratio(new) > _ratio(old) or new.d_ff > old.d_ff:
            raise UserError(f"{where}: target is wider than the layer; use widen, or reshape for both")


def _narrower(old: LayerShape, new: LayerShape) -> bool:
    """Whether anything of the old layer is cut. Where its KV groups are divided, the parts hold its heads together."""
    parts = new.n_kv_heads // old.n_kv_heads if old.n_heads else 0
    return parts * _ratio(new) < _ratio(old) or new.d_ff < old.d_ff


def _ratio(layer: LayerShape) -> int:
    """Query heads of a KV group."""
    return layer.n_heads // layer.n_kv_heads if layer.n_heads else 0


def carry_out(plan: ResizePlan, read: Read, init: Init, noise: float) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every parameter of a plan whose copies share out with this noise what reads them, and whose new halves
    are drawn."""
    shared = {n: x for n, x in plan.parameters.items() if x.axes and x.axes[-1] and x.axes[-1].is_shared}
    rest = {name: x for name, x in plan.parameters.items() if name not in shared}
    yield from resize.apply(dataclasses.replace(plan, parameters=rest), read)
    for name, entry in shared.items():
        old = read(entry.sources[0][0])
        whole = entry.make(old, old, factors=False)
        yield name, _share_out(whole, entry.axes[-1], noise, init.seed, name)
    like = read("norm.weight")
    missing = [name for name, x in plan.parameters.items() if not x.sources and x.fill is None]
    for name, value in init.draw(plan.shape, missing):
        yield name, value.to(like)


_SILENT = 0.02
"""The size of weights that shares of zeros are like: a usual initial deviation."""
_ROWS = 16
"""Of a matrix, worked on at a time: sums and shares take about thirty bytes a number in fp32."""


def _share_out(
    whole_RC: torch.Tensor, axis: AxisMap | None, noise: float, seed: int, name: str
) -> torch.Tensor:
    """What each copy of a unit is read by, from columns that are the old ones over and over.

    To equal shares are added random numbers that sum to zero over the copies; their root mean square is `noise` times a
    share's own, and where a layer is silent times `_SILENT`.
    """
    import numpy as np
    import torch

    from entasis.model.initialisation import draw_normal

    assert axis is not None, "its columns have been mapped"
    units_C = torch.from_numpy(np.unique(axis.source, return_inverse=True)[1]).to(whole_RC.device)
    wide = torch.promote_types(whole_RC.dtype, torch.float32)
    factor_C = torch.from_numpy(axis.factor).to(whole_RC.device, wide)
    counts_U = torch.bincount(units_C)
    rows = range(0, len(whole_RC), _ROWS)

    def shares(start: int) -> torch.Tensor:
        """The even ones of some rows."""
        return whole_RC[start : start + _ROWS].to(wide) * factor_C

    squares_C = sum((shares(r).square().sum(dim=0) for r in rows), start=torch.zeros_like(factor_C))
    size_C = (squares_C / len(whole_RC)).sqrt()
    silent_C = ~whole_RC.any(dim=0)
    drawn_RC = draw_normal(tuple(whole_RC.shape), seed, f"{name}/copies") if noise else None
    result_RC = torch.empty_like(whole_RC)
    for r in rows:
        shares_rC = shares(r)
        if drawn_RC is not None:
            drawn_rC = drawn_RC[r : r + _ROWS].to(shares_rC)
            drawn_rC *= torch.where(size_C == 0, _SILENT, size_C) * noise
            total_rU = shares_rC.new_zeros(len(shares_rC), len(counts_U)).index_add_(1, units_C, drawn_rC)
            # Alone, a unit's random numbers are their own mean: nothing is added.
            shares_rC += drawn_rC - (total_rU / counts_U)[:, units_C]
        if whole_RC.dtype != wide:
            whole_rC = whole_RC[r : r + _ROWS].to(wide)
            shares_rC = _adding_up(shares_rC, whole_rC, silent_C, units_C, whole_RC.dtype, even=not noise)
        result_RC[r : r + _ROWS] = shares_rC
    return result_RC


def _adding_up(
    shares_RC: torch.Tensor,
    whole_RC: torch.Tensor,
    silent_C: torch.Tensor,
    units_C: torch.Tensor,
    dtype: torch.dtype,
    *,
    even: bool,
) -> torch.Tensor:
    """The shares in a dtype narrower than theirs; those of one number add up to it to the bit.

    All are whole multiples of one step, the last place of the number that is shared out, and no more of them than the dtype
    can count, so that each is one of its numbers. The last copy gets what the others leave. Shares that are `even` are smaller, and
    so may the step be.
    """
    import torch

    info, counts_U = torch.finfo(dtype), torch.bincount(units_C)
    order_C = units_C.argsort(stable=True)
    starts_U = counts_U.cumsum(0) - counts_U
    place_C = torch.empty_like(order_C)
    place_C[order_C] = torch.arange(len(order_C), device=order_C.device) - starts_U[units_C[order_C]]
    first_U = order_C[starts_U]
    whole_RU = whole_RC[:, first_U]
    step_RU = _power_below(torch.where(silent_C[first_U], _SILENT, whole_RU)) * info.eps
    if even:
        step_RU = step_RU / _power_below(counts_U.to(step_RU))
    step_RU = step_RU.clamp(min=info.tiny * info.eps)
    most_RU = (info.max / step_RU).clamp(max=2 / info.eps)
    rest_RU = whole_RU / step_RU
    result_RC = torch.empty_like(whole_RC, dtype=dtype)
    for place in range(int(counts_U.max())):
        columns = (place_C == place).nonzero()[:, 0]
        u = units_C[columns]
        most, rest, step = most_RU[:, u], rest_RU[:, u], step_RU[:, u]
        room = most * (counts_U[u] - 1 - place)  # what the copies after this one can take
        share = (shares_RC[:, columns] / step).round()
        share = share.clamp(torch.maximum(-most, rest - room), torch.minimum(most, rest + room))
        rest_RU[:, u] = rest - share
        result_RC[:, columns] = (share * step).to(dtype)
    return result_RC


def _power_below(x: torch.Tensor) -> torch.Tensor:
    """The largest power of two that is not above the size of each number; 0 for 0."""
    import torch

    return (x / 2 / torch.frexp(x).mantissa).nan_to_num(0.0)
