"""Operators that match heads and FFN units of neighbouring layers before they mix them; see `entasis.grow.alignment`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from entasis.grow import positions, resize
from entasis.grow.growth import OPERATORS, GrownLayer, Operator, insert, name_of
from entasis.grow.positions import Positions
from entasis.grow.resize import Read, ResizePlan
from entasis.grow.transitions import Init
from entasis.shape.shapes import ModelShape

if TYPE_CHECKING:
    import torch


@OPERATORS.register("aligned_average")
class AlignedAverage(Operator):
    """Between layers i and i+1 the mean of layer i and of layer i+1 with its heads and FFN units matched to it (optimal
    assignment; OpT-DeUS uses optimal transport, 2508.08011)."""

    output: ClassVar[float] = 1.0
    after: Positions
    control: bool = False
    """Match to the layer's residual basis rotated at random instead: what comes of matching alone, and no alignment."""

    def layers(self, shape: ModelShape) -> list[GrownLayer]:
        where = f"grow: {name_of(self)}"
        places = positions.resolve(self.after, shape.n_layers, between=True, where=where)
        return insert(
            shape, {i: GrownLayer(((i, 0.5), (i + 1, 0.5)), is_new=True, output=self.output) for i in places}
        )

    def memory(self, shape: ModelShape) -> int:
        return matching_memory(shape)

    def weights(self, plan: ResizePlan, read: Read, init: Init) -> Iterator[tuple[str, torch.Tensor]]:
        from entasis.grow import alignment, symmetry

        old, kept, matched = shape_before(plan), dict(plan.parameters), []
        new = [i for i, layer in enumerate(plan.layers) if layer.is_new]
        for done, index in enumerate(new):
            below, above = plan.layers[index].sources
            found = alignment.align(
                read, old, source=above, target=below, seed=init.seed, control=self.control
            )
            near = symmetry.rewriting(read, old, {above: found.symmetry})
            matched.append(found.told())
            entries = {
                name: kept.pop(name) for name in plan.parameters if name.startswith(f"blocks.{index}.")
            }
            yield from resize.apply(dataclasses.replace(plan, parameters=entries), near)
            self.told(done + 1, len(new))
        self.diagnostics["alignment"] = matched
        yield from resize.apply(dataclasses.replace(plan, parameters=kept), read)


@OPERATORS.register("zero_aligned_average")
class ZeroAlignedAverage(AlignedAverage):
    """As `aligned_average`, with output projections of 0 (OpT-DeUS, 2508.08011, with an assignment for its transport). With
    reordered norms it is the norms' weights that are 0."""

    keeps_function: ClassVar[bool] = True
    output: ClassVar[float] = 0.0


def matching_memory(shape: ModelShape) -> int:
    """About the most bytes that are held to match two layers: scores of all pairs of units, and the units."""
    d_ff = max(layer.d_ff for layer in shape.layers)
    return 28 * d_ff**2 + 24 * d_ff * shape.d_model


def shape_before(plan: ResizePlan) -> ModelShape:
    """The shape of the model that layers were inserted into."""
    old = [shape for shape, layer in zip(plan.shape.layers, plan.layers, strict=True) if not layer.is_new]
    return dataclasses.replace(plan.shape, layers=tuple(old))
