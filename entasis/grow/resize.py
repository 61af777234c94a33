"""From one list of layers to another: heads and FFN units added, copied or cut, whole layers dropped and repeated.

    plan = resize.plan(shape, layers, new_units="copies")
    tensors = dict(resize.apply(plan, tensors))

A plan says of every parameter of the new model which one of the old it comes from, and along each axis which places,
times which factors. It is made from shapes alone, without torch; the same plan serves weights, optimizer moments and provenance, and is
carried out one parameter at a time. The axes come from `entasis.shape.layout`.

| change                       | what the model computes afterwards                                                  |
|------------------------------|-------------------------------------------------------------------------------------|
| widened, `new_units: zeros`  | the same; new heads and units are zero                                              |
| widened, `new_units: copies` | the same (Net2Net, 1511.05641): what reads a unit is divided among its copies        |
| a half that was not there    | the same: zeros; with `copies` initial values, to be drawn, behind an output of 0   |
| KV groups divided            | the same: each part of the query heads gets a copy of its group's keys and values   |
| cut                          | what the kept heads and units compute: the first of the order given                 |
| dropped, repeated            | another function                                                                    |

A group is divided where a layer gets at least twice the KV groups, of fewer query heads each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from entasis.errors import UserError
from entasis.shape import layout
from entasis.shape.shapes import LayerShape, ModelShape

if TYPE_CHECKING:
    import torch

NewUnits = Literal["zeros", "copies"]
Read = Callable[[str], "torch.Tensor"]
"""Gives one tensor of the old model by its name, in the dtype it is stored in; may be called again."""


@dataclass(frozen=True)
class Order:
    """In which order a layer's KV groups, the query heads of each and its FFN units are taken; None is as they stand. Cutting
    keeps the first."""

    groups: Sequence[int] | None = None
    heads: Sequence[Sequence[int]] | None = None
    """Of each group as it stands, the order of its query heads, from 0."""
    units: Sequence[int] | None = None


@dataclass(frozen=True)
class AxisMap:
    """Where the places along one axis come from."""

    source: np.ndarray
    """[n] place in the old axis; -1 is new, and zero."""
    factor: np.ndarray
    """[n] what the old number is multiplied by."""
    is_shared: bool = False
    """Whether the factors are shares of one number among the copies of what it reads."""


@dataclass(frozen=True)
class ParameterMap:
    """Where one parameter comes from."""

    sources: tuple[tuple[str, float], ...]
    """(name in the old model, its share), added up. Without any it is `fill`."""
    size: tuple[int, ...]
    axes: tuple[AxisMap | None, ...] = ()
    """None: as it was."""
    fill: float | None = 0.0
    """The value of a parameter that comes from nowhere; None: the transition makes it, from whatever it reads."""

    @property
    def source(self) -> str | None:
        """The first of the sources."""
        return self.sources[0][0] if self.sources else None

    @property
    def is_moved(self) -> bool:
        """Whether it is one old parameter, along other places at most: nothing is added up."""
        return len(self.sources) == 1 and self.sources[0][1] == 1.0

    def make(self, old: torch.Tensor | None, like: torch.Tensor, *, factors: bool = True) -> torch.Tensor:
        """One old parameter along the new axes, in `like`'s dtype and device; moments are taken without the `factors`.

        Without an old one: the fill.
        """
        import torch

        if old is None:
            assert self.fill is not None, "the transition makes it"
            return like.new_full(self.size, self.fill)
        for dim, axis in enumerate(self.axes):
            if axis is None:
                continue
            places = torch.from_numpy(axis.source.clip(min=0)).to(old.device)
            old = old.index_select(dim, places)
            scale = (axis.source >= 0) * (axis.factor if factors else 1.0)
            if (scale != 1.0).any():
                old = old * torch.from_numpy(scale).to(old).view(-1, *(1,) * (old.ndim - dim - 1))
        return old

    def mix(self, read: Read, like: torch.Tensor) -> torch.Tensor:
        """The new parameter: the sum of its sources' shares, computed in fp32 at least, in `like`'s dtype."""
        import torch

        if not self.sources or self.is_moved:
            return self.make(read(self.sources[0][0]) if self.sources else None, like)
        wide = torch.promote_types(like.dtype, torch.float32)
        parts = (self.make(read(name), like).to(wide) * share for name, share in self.sources)
        return functools.reduce(torch.add, parts).to(like.dtype)


@dataclass(frozen=True)
class Origin:
    """What a layer of the new model was made of."""

    sources: tuple[int, ...]
    """Layers of the old model: none for one that was drawn, several for one made of several."""
    operator: str | None = None
    """What made it; None for a layer that was only moved."""
    is_new: bool = False
    """Whether it was added. An old layer has one source, and no other old layer has the same."""


@dataclass(frozen=True)
class ResizePlan:
    """How a model of another list of layers is made."""

    shape: ModelShape
    """The new model's."""
    layers: tuple[Origin, ...]
    """Of every new layer."""
    parameters: dict[str, ParameterMap] = field(repr=False)

    def is_new(self, name: str) -> bool:
        """Whether a parameter belongs to a layer that was added: no optimizer remembers anything of it."""
        return name.startswith("blocks.") and self.layers[int(name.split(".")[1])].is_new


def plan(
    shape: ModelShape,
    layers: Sequence[LayerShape],
    *,
    sources: Sequence[int] | None = None,
    new_units: NewUnits = "zeros",
    orders: Mapping[int, Order] | None = None,
) -> ResizePlan:
    """How a model of `shape` becomes one of `layers`.

    `sources` names for each new layer the old one that it is made from; without it they correspond one to one, and
    fewer or more of them are refused. `orders` holds the orders of the old layers in which their KV groups and units
    are taken. Raises `UserError` naming the layer for what cannot be resized.
    """
    layers = tuple(layers)
    sources = tuple(range(shape.n_layers) if sources is None else sources)
    if len(sources) != len(layers):
        raise UserError(
            f"resize: {len(sources)} layers cannot become {len(layers)} without saying from which each is made"
        )
    if wrong := [i for i in sources if not 0 <= i < shape.n_layers]:
        raise UserError(f"resize: there is no layer {wrong[0]}; the model's are 0 to {shape.n_layers - 1}")
    new = replace(shape, layers=layers)
    parameters: dict[str, ParameterMap] = {}
    for i, source in enumerate(sources):
        order = (orders or {}).get(source, Order())
        parameters |= map_layer(shape, source, new, i, order, new_units)
    return ResizePlan(new, _origins(shape, layers, sources), with_outer(new, parameters))


def with_outer(shape: ModelShape, layers: Mapping[str, ParameterMap]) -> dict[str, ParameterMap]:
    """The maps of all layers with those of the parameters outside, which stay, in the model's order."""
    outside = {
        p.name: ParameterMap(((p.name, 1.0),), p.size)
        for p in layout.outer_parameters(shape)
        if p.shares is None
    }
    return {name: {**outside, **layers}[name] for name in layout.sizes(shape)}


def apply(plan: ResizePlan, tensors: Mapping[str, torch.Tensor] | Read) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the new model, one at a time, in the model's order, but for those that the transition makes.

    `tensors` are the old model's, or a function that reads one of them. What does not change is passed on, and copied
    only where it goes to two places.
    """
    read = tensors.__getitem__ if isinstance(tensors, Mapping) else tensors
    like, given = read("norm.weight"), set[str | None]()
    for name, entry in plan.parameters.items():
        if not entry.sources and entry.fill is None:
            continue
        made = entry.mix(read, like)
        yield name, made.clone() if entry.sources and entry.source in given else made
        given.add(entry.source)


def rounds(plan: ResizePlan) -> bool:
    """Whether numbers of old layers are multiplied by what is no power of two, so that a dtype narrower than fp32 rounds them.

    Shares among copies are not meant: `widen` makes them add up in any dtype.
    """
    old = [entry for name, entry in plan.parameters.items() if not plan.is_new(name)]
    factors = [np.array([share for entry in old for _, share in entry.sources])]
    factors += [axis.factor for entry in old for axis in entry.axes if axis and not axis.is_shared]
    return any((np.abs(np.frexp(x)[0]) != 0.5).any() for x in factors)


def _origins(shape: ModelShape, layers: Sequence[LayerShape], sources: Sequence[int]) -> tuple[Origin, ...]:
    """The first layer made from an old one is that one; others made from it are new."""
    return tuple(
        Origin(
            (source,),
            None if layer == shape.layers[source] and source not in sources[:i] else "resize",
            source in sources[:i],
        )
        for i, (layer, source) in enumerate(zip(layers, sources, strict=True))
    )


def map_layer(
    old_shape: ModelShape,
    source: int,
    new_shape: ModelShape,
    index: int,
    order: Order = Order(),
    new_units: NewUnits = "zeros",
) -> dict[str, ParameterMap]:
    """Where the parameters of one new layer come from when it is made of one old. Raises `UserError`.

    Under LayerNorm scaling its norms take along the factor of the place that they leave.
    """
    old, new = old_shape.layers[source], new_shape.layers[index]
    where = f"resize: layer {source}"
    numbered = layout.ffn_kind(old_shape, old).numbers and old.d_ff != new.d_ff
    if old.d_ff and new.d_ff and (old.ffn != new.ffn or numbered):
        raise UserError(f"{where}: an FFN of another kind, or one with numbers of its own, cannot be resized")
    axes = {
        **_head_axes(old_shape, old, new, order, new_units, where),
        **_unit_axes(old, new, order, new_units, where),
    }
    there = {p.name.removeprefix(f"blocks.{source}.") for p in layout.layer_parameters(old_shape, source)}
    result = {}
    for p in layout.layer_parameters(new_shape, index):
        name = p.name.removeprefix(f"blocks.{index}.")
        if name not in there:
            result[p.name] = ParameterMap((), p.size, fill=_fill(new_shape, p, new_units))
            continue
        maps = tuple(
            axes.get(f"{p.role}:{axis}") or axes.get(f"{'reads' if dim else 'writes'}:{axis}")
            for dim, axis in enumerate(p.axes)
        )
        scaled = old_shape.norm_scaling and p.part == "norms"
        share = math.sqrt((index + 1) / (source + 1)) if scaled else 1.0
        result[p.name] = ParameterMap(
            ((f"blocks.{source}.{name}", share),), p.size, maps if any(maps) else ()
        )
    return result


def _fill(shape: ModelShape, p: layout.Parameter, new_units: NewUnits) -> float | None:
    """What a parameter of a half begins with that its layer had not.

    Zeros before and behind would leave every gradient zero: only the output is, and the other matrices are drawn.
    """
    if new_units == "copies" and is_output(shape, p):
        return 0.0
    if new_units == "copies" and p.is_matrix:
        return None
    return 1.0 if "norm" in p.role and not p.is_bias else 0.0


def is_output(shape: ModelShape, p: layout.Parameter) -> bool:
    """Whether a parameter is the last that a branch goes through before it is added to the residual stream.

    With reordered norms that is the norm's: an RMSNorm that reads zeros would multiply gradients by 1/sqrt(eps).
    """
    if shape.norm_placement == "reordered":
        return p.part == "norms"
    return p.part in ("attention", "feedforward") and p.axes[0] == "residual"


def _unit_axes(
    old: LayerShape, new: LayerShape, order: Order, new_units: NewUnits, where: str
) -> dict[str, AxisMap]:
    if not (old.d_ff and new.d_ff) or (old.d_ff == new.d_ff and order.units is None):
        return {}
    units = _extended(_ordered(order.units, old.d_ff, f"{where}: units"), new.d_ff, new_units)
    return {"writes:ffn": _written(units), "reads:ffn": _read(units)}


def _head_axes(
    shape: ModelShape, old: LayerShape, new: LayerShape, order: Order, new_units: NewUnits, where: str
) -> dict[str, AxisMap]:
    if not (old.n_heads and new.n_heads):
        return {}
    same = (old.n_heads, old.n_kv_heads) == (new.n_heads, new.n_kv_heads)
    if same and order.groups is None and order.heads is None:
        return {}
    old_ratio, new_ratio = old.n_heads // old.n_kv_heads, new.n_heads // new.n_kv_heads
    # Groups of fewer heads, and as many as make up for it: each is divided into parts, with copies of its keys and values.
    parts = max(1, new.n_kv_heads // old.n_kv_heads) if new_ratio < old_ratio else 1
    whole = np.tile(_ordered(order.groups, old.n_kv_heads, f"{where}: groups"), parts)
    groups = _extended(whole, new.n_kv_heads, new_units)
    within_PR = _extended(np.arange(old_ratio), parts * new_ratio, new_units).reshape(parts, new_ratio)
    within_GR = within_PR[np.arange(len(groups)) // old.n_kv_heads % parts]
    orders = order.heads if order.heads is not None else [None] * old.n_kv_heads
    taken_GR = np.stack([_ordered(x, old_ratio, f"{where}: heads of a group") for x in orders])
    taken_GR = np.take_along_axis(taken_GR[groups.clip(min=0)], within_GR.clip(min=0), axis=1)
    heads_GR = groups[:, None] * old_ratio + taken_GR
    heads_GR[(groups < 0)[:, None] | (within_GR < 0)] = -1
    query, kv = (_features(units, shape.head_dim) for units in (heads_GR.flatten(), groups))
    result = {
        "writes:query": _written(query),
        "reads:query": _read(query),
        "writes:kv": _written(kv),
    }
    if shape.qk_norm == "full":
        # The norm's mean square is now taken over other numbers. Over zeros it shrinks: stretching what the norm reads
        # and shrinking its weight restores the result exactly, epsilon included. Over copies it stays, if all are copied
        # alike.
        for role, features in (("query", query), ("key", kv)):
            kept = features[features >= 0]
            if len(set(np.unique(kept, return_counts=True)[1])) > 1:
                raise UserError(
                    f"{where}: its full-width QK-norm would weigh heads that are copied unequally often; choose "
                    "multiples of its heads, or new_units: zeros"
                )
            stretch = math.sqrt(len(features) / len(kept))
            axis = "query" if role == "query" else "kv"
            result[f"{role}:{axis}"] = _written(features, stretch)
            result[f"{role}_norm:{axis}"] = _written(features, 1 / stretch)
    return result


def _ordered(order: Sequence[int] | None, count: int, where: str) -> np.ndarray:
    if order is None:
        return np.arange(count)
    if sorted(order) != list(range(count)):
        raise UserError(f"{where} are not an order of 0 to {count - 1}")
    return np.array(order)


def _extended(units: np.ndarray, size: int, new_units: NewUnits) -> np.ndarray:
    """The first `size` units; beyond them -1, or the units once more from the start."""
    if new_units == "copies":
        return np.resize(units, size)
    return np.concatenate([units[:size], np.full(max(0, size - len(units)), -1)])


def _features(units: np.ndarray, width: int) -> np.ndarray:
    """Places of the numbers of each unit, `width` of them; -1 stays."""
    features = units[:, None] * width + np.arange(width)
    features[units < 0] = -1
    return features.flatten()


def _written(source: np.ndarray, factor: float = 1.0) -> AxisMap:
    return AxisMap(source, np.full(source.shape, factor))


def _read(source: np.ndarray) -> AxisMap:
    """What reads a unit is divided among its copies."""
    old = source.clip(min=0)
    counts = np.bincount(old, weights=source >= 0)
    return AxisMap(source, 1 / np.maximum(counts[old], 1), is_shared=bool((counts > 1).any()))
