"""The ways to write one layer down that leave the model's function alone.

    maps = symmetry.parameter_maps(shape, 3, Symmetry(units=order, signs=signs))
    weight = maps["blocks.3.feedforward.up.weight"].make(weight, weight)

| what changes places or sign    | why nothing follows                                                               |
|--------------------------------|-----------------------------------------------------------------------------------|
| FFN units                      | their contributions are added up                                                  |
| query heads of one KV group    | the same; each keeps the keys and values that it reads                            |
| KV groups, with their heads    | the same                                                                          |
| sign of a unit's `up`, `down`  | the unit is silu(gate) · up, linear in `up`; refused where the FFN has no gate    |

Neighbouring layers of a trained model agree in none of these, so their weights, entry by entry, are of different things.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from entasis.errors import UserError
from entasis.grow.resize import AxisMap, ParameterMap, Read
from entasis.shape import layout
from entasis.shape.shapes import ModelShape

if TYPE_CHECKING:
    import torch

_UNITWISE = {"swiglu": True, "gelu": False, "gelu_tanh": False}
"""Kinds of FFN whose units are added up → whether a unit's sign is free."""


@dataclass(frozen=True)
class Symmetry:
    """Where each head and unit of a layer is taken from; None is as it stands."""

    groups: np.ndarray | None = None
    """[G] the old KV group at each place."""
    heads: np.ndarray | None = None
    """[G, R] the old query head, counted within its old group, at each place of each new group."""
    units: np.ndarray | None = None
    """[N] the old FFN unit at each place."""
    signs: np.ndarray | None = None
    """[N] 1 or -1, for the unit at each new place."""


def signs_are_free(shape: ModelShape, layer: int) -> bool:
    """Whether a unit's `up` and `down` may change sign together. Raises `UserError` for an FFN without such units."""
    kind = layout.ffn_kind(shape, shape.layers[layer]).name
    if kind not in _UNITWISE:
        raise UserError(
            f"symmetry: layer {layer}: which units of an FFN of kind {kind!r} can change places is not known"
        )
    return _UNITWISE[kind]


def parameter_maps(shape: ModelShape, layer: int, symmetry: Symmetry) -> dict[str, ParameterMap]:
    """How each parameter of a layer is rewritten. Raises `UserError` naming the layer for what is not a symmetry of it."""
    axes = {**_head_axes(shape, layer, symmetry), **_unit_axes(shape, layer, symmetry)}
    result = {}
    for p in layout.layer_parameters(shape, layer):
        maps = tuple(axes.get(f"{p.role}:{axis}") or axes.get(axis) for axis in p.axes)
        result[p.name] = ParameterMap(((p.name, 1.0),), p.size, maps if any(maps) else ())
    return result


def rewriting(read: Read, shape: ModelShape, symmetries: Mapping[int, Symmetry]) -> Read:
    """A function that reads as `read` does, these layers being rewritten."""
    maps: dict[str, ParameterMap] = {}
    for layer, symmetry in symmetries.items():
        maps |= parameter_maps(shape, layer, symmetry)

    def rewritten(name: str) -> torch.Tensor:
        w = read(name)
        return maps[name].make(w, w) if name in maps else w

    return rewritten


def _unit_axes(shape: ModelShape, layer: int, symmetry: Symmetry) -> dict[str, AxisMap]:
    if symmetry.units is None and symmetry.signs is None:
        return {}
    width = shape.layers[layer].d_ff
    signed = signs_are_free(shape, layer)
    units = _permutation(symmetry.units, width, f"symmetry: layer {layer}: units")
    axes = {"ffn": AxisMap(units, np.ones(width))}
    if symmetry.signs is not None and (symmetry.signs != 1).any():
        if not signed:
            raise UserError(f"symmetry: layer {layer}: signs of units are free only where the FFN has a gate")
        if symmetry.signs.shape != (width,) or (np.abs(symmetry.signs) != 1).any():
            raise UserError(f"symmetry: layer {layer}: signs are not {width} of 1 and -1")
        axes |= dict.fromkeys(("up:ffn", "down:ffn"), AxisMap(units, symmetry.signs))
    return axes


def _head_axes(shape: ModelShape, layer: int, symmetry: Symmetry) -> dict[str, AxisMap]:
    if symmetry.groups is None and symmetry.heads is None:
        return {}
    G = shape.layers[layer].n_kv_heads
    R = shape.layers[layer].n_heads // G
    where = f"symmetry: layer {layer}"
    groups = _permutation(symmetry.groups, G, f"{where}: KV groups")
    within_GR = np.tile(np.arange(R), (G, 1)) if symmetry.heads is None else np.asarray(symmetry.heads)
    if within_GR.shape != (G, R):
        raise UserError(f"{where}: heads are not {G} groups of {R}")
    for row in within_GR:
        _permutation(row, R, f"{where}: heads of a group")
    heads = (groups[:, None] * R + within_GR).flatten()

    def numbers(units: np.ndarray) -> AxisMap:
        places = (units[:, None] * shape.head_dim + np.arange(shape.head_dim)).flatten()
        return AxisMap(places, np.ones(len(places)))

    return {"query": numbers(heads), "kv": numbers(groups)}


def _permutation(order: np.ndarray | None, count: int, where: str) -> np.ndarray:
    if order is None:
        return np.arange(count)
    if sorted(order) != list(range(count)):
        raise UserError(f"{where} are not an order of 0 to {count - 1}")
    return np.asarray(order)
