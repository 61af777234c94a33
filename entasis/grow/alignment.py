"""Which head and unit of one layer is which of another: the optimal assignment between two layers.

    found = alignment.align(read, shape, source=5, target=4)
    found.symmetry, found.units.cosine, found.units.control

A unit is compared by its rows and columns in the residual basis (gate, up, down), with the norm's weight folded into what
it scales; a query head by its query rows and output columns, a KV group by its key and value rows and by the best
assignment of its heads. Similarity is the sum of cosines, maximised by `scipy.optimize.linear_sum_assignment`; where
signs are free a unit takes the better of its two. What matching finds in two unrelated layers is told by the control: the
source's residual basis is rotated at random before its heads and units are matched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from entasis.errors import UserError
from entasis.grow import symmetry
from entasis.grow.resize import Read
from entasis.grow.symmetry import Symmetry
from entasis.shape import layout
from entasis.shape.shapes import ModelShape


@dataclass(frozen=True)
class Cosines:
    """Mean cosine between what stands at the same place in two layers, over its matrices."""

    before: float
    """As the layers stand."""
    cosine: float
    """After matching."""
    control: float
    """After matching with the source's residual basis rotated at random: what matching alone yields."""


@dataclass(frozen=True)
class Alignment:
    """How layer `source` is rewritten to be as near to `target` as it can be."""

    source: int
    target: int
    symmetry: Symmetry
    heads: Cosines | None
    """Over query and attention output; None without attention."""
    units: Cosines | None
    """None without an FFN."""

    def told(self) -> dict[str, Any]:
        """What a report says of it."""
        parts = {"heads": self.heads, "units": self.units}
        known = {name: dataclasses.asdict(part) for name, part in parts.items() if part}
        return {"layers": [self.target, self.source], **known}


def align(
    read: Read, shape: ModelShape, *, source: int, target: int, seed: int = 0, control: bool = False
) -> Alignment:
    """Matches layer `source` to `target`. Raises `UserError` where the two differ in shape.

    `seed` is that of the control's rotation. With `control` the symmetry is the control's.
    """
    there, here = shape.layers[source], shape.layers[target]
    if there != here:
        raise UserError(
            f"align: layers {target} and {source} differ in shape, so their units do not correspond"
        )
    basis_DD = _rotation(shape.d_model, seed)
    groups = heads = units = signs = None
    of_heads = of_units = None
    if here.n_heads:
        (groups, heads, cosine), turned = (
            _match_heads(read, shape, source, target, basis) for basis in (None, basis_DD)
        )
        of_heads = Cosines(_head_cosine(read, shape, source, target), cosine, turned[2])
        if control:
            groups, heads, _ = turned
    if here.d_ff:
        signed = symmetry.signs_are_free(shape, target)
        own, other = unit_features(read, shape, target), unit_features(read, shape, source)
        before = float(torch.stack([(a * b).sum(1) for a, b in zip(own, other, strict=True)]).mean())
        (units, signs, cosine), turned = (
            match_units(own, x, signed=signed) for x in (other, [y @ basis_DD for y in other])
        )
        of_units = Cosines(before, cosine, turned[2])
        if control:
            units, signs, _ = turned
    return Alignment(source, target, Symmetry(groups, heads, units, signs), of_heads, of_units)


def chain(
    read: Read, shape: ModelShape, *, seed: int = 0
) -> Iterator[tuple[int, Symmetry, Alignment | None]]:
    """All layers in one order: the first by norm (`canonical`), each other one matched to the one before.

    Yields (layer, how it is rewritten, its alignment to the one before as that now stands). Raises `UserError` for layers
    that differ in shape.
    """
    first = canonical(read, shape, 0)
    yield 0, first, None
    before = first
    for layer in range(1, shape.n_layers):
        near = symmetry.rewriting(read, shape, {layer - 1: before})
        found = align(near, shape, source=layer, target=layer - 1, seed=seed)
        before = found.symmetry
        yield layer, before, found


def canonical(read: Read, shape: ModelShape, layer: int) -> Symmetry:
    """An order that does not depend on how the layer is written down, up to ties: by norm, `up` never against `gate`.

    The first of a chain of aligned layers is put into it.
    """
    groups = heads = units = signs = None
    at = shape.layers[layer]
    if at.n_heads:
        G, K = at.n_kv_heads, shape.head_dim
        query, output = (
            _folded(read, shape, layer, role).view(G, at.n_heads // G, -1).norm(dim=2).numpy()
            for role in ("query", "attention_output")
        )
        heads = np.argsort(-query * output, axis=1, kind="stable")
        value = _folded(read, shape, layer, "value").view(G, K, -1).flatten(1).norm(dim=1).numpy()
        groups = np.argsort(-value * (query * output).sum(1), kind="stable")
        heads = heads[groups]
    if at.d_ff:
        signed = symmetry.signs_are_free(shape, layer)
        parts = [_folded(read, shape, layer, role) for role in _unit_roles(shape, layer)]
        units = np.argsort(-torch.stack([x.norm(dim=1) for x in parts]).prod(0).numpy(), kind="stable")
        if signed:
            agrees = (parts[0] * parts[1]).sum(1).numpy()[units]
            signs = np.where(agrees < 0, -1.0, 1.0)
    return Symmetry(groups, heads, units, signs)


def unit_features(read: Read, shape: ModelShape, layer: int) -> list[torch.Tensor]:
    """Per matrix of the FFN the layer's units [N, D] as unit vectors in the residual basis, fp32."""
    return [_unit(_folded(read, shape, layer, role)) for role in _unit_roles(shape, layer)]


def match_units(
    own: list[torch.Tensor], other: list[torch.Tensor], *, signed: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """For each unit [N] of `own` the matched one of `other`, its sign, and the mean cosine over units and matrices."""
    first = len(own) - 2 if signed else len(own)  # up and down share a sign, the gate has none
    fixed_NN = torch.zeros(len(own[0]), len(other[0]))
    free_NN = torch.zeros_like(fixed_NN)
    for i, (a_ND, b_ND) in enumerate(zip(own, other, strict=True)):
        (fixed_NN if i < first else free_NN).addmm_(a_ND, b_ND.T)
    score_NN = fixed_NN + free_NN.abs()
    units = linear_sum_assignment(score_NN.numpy(), maximize=True)[1]
    rows = torch.arange(len(units))
    signs = np.where(free_NN[rows, units].numpy() < 0, -1.0, 1.0)
    return units, signs, float(score_NN[rows, units].mean()) / len(own)


def _rotation(width: int, seed: int) -> torch.Tensor:
    """A residual basis [D, D] drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    basis_DD, upper_DD = torch.linalg.qr(torch.randn(width, width, generator=generator))
    return basis_DD * upper_DD.diagonal().sign()


def _match_heads(
    read: Read, shape: ModelShape, source: int, target: int, basis_DD: torch.Tensor | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """KV groups [G] and heads [G, R] of the source, whose residual basis is turned by `basis_DD` first, and the heads' mean
    cosine."""
    G = shape.layers[target].n_kv_heads
    R = shape.layers[target].n_heads // G

    def cosines(role: str, count: int) -> np.ndarray:
        a, b = (_folded(read, shape, i, role) for i in (target, source))
        b = b if basis_DD is None else b @ basis_DD
        return (_unit(a.reshape(count, -1)) @ _unit(b.reshape(count, -1)).T).numpy()

    head_HH = cosines("query", G * R) + cosines("attention_output", G * R)
    head_GGRR = head_HH.reshape(G, R, G, R).transpose(0, 2, 1, 3)
    group_GG = cosines("key", G) + cosines("value", G)
    best_GGR = np.empty((G, G, R), dtype=int)
    for g in range(G):
        for h in range(G):
            rows, best_GGR[g, h] = linear_sum_assignment(head_GGRR[g, h], maximize=True)
            group_GG[g, h] += head_GGRR[g, h][rows, best_GGR[g, h]].sum()
    groups = linear_sum_assignment(group_GG, maximize=True)[1]
    heads = best_GGR[np.arange(G), groups]
    cosine_GR1 = np.take_along_axis(head_GGRR[np.arange(G), groups], heads[:, :, None], axis=2)
    return groups, heads, float(cosine_GR1.mean()) / 2


def _head_cosine(read: Read, shape: ModelShape, source: int, target: int) -> float:
    """Between query heads at the same place, as the layers stand."""
    H = shape.layers[target].n_heads
    found = []
    for role in ("query", "attention_output"):
        a, b = (_unit(_folded(read, shape, i, role).reshape(H, -1)) for i in (target, source))
        found.append((a * b).sum(1).mean())
    return float(sum(found) / 2)


def _unit_roles(shape: ModelShape, layer: int) -> list[str]:
    return [role for role, _ in layout.ffn_kind(shape, shape.layers[layer]).matrices]


def _folded(read: Read, shape: ModelShape, layer: int, role: str) -> torch.Tensor:
    """One matrix of a layer as [inner, D], fp32, with the norm's weight multiplied into what it scales."""
    entries = {p.role: p for p in layout.layer_parameters(shape, layer) if not p.is_bias}
    p = entries[role]
    w_ND = read(p.name).float().cpu()
    if p.axes[0] == "residual":
        w_ND = w_ND.T
    half = "attention_norm" if p.part == "attention" else "feedforward_norm"
    if (shape.norm_placement == "pre") == (p.axes[-1] == "residual"):
        w_ND = w_ND * read(entries[half].name).float().cpu()
    return w_ND.contiguous()


def _unit(x_ND: torch.Tensor) -> torch.Tensor:
    return x_ND / x_ND.norm(dim=1, keepdim=True).clamp_min(1e-30)
