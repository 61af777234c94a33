"""Operators whose new layers are predicted from their two neighbours: LESA (2502.13794), and what it has to beat."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from entasis.grow import positions, resize
from entasis.grow.growth import OPERATORS, GrownLayer, Operator, insert, name_of
from entasis.grow.network_settings import NetworkSettings
from entasis.grow.operators.aligned import matching_memory, shape_before
from entasis.grow.positions import Positions
from entasis.grow.resize import Read, ResizePlan
from entasis.grow.transitions import Init
from entasis.shape import layout
from entasis.shape.shapes import ModelShape

if TYPE_CHECKING:
    import torch

    from entasis.grow.lesa import Fit


class _Predicted(Operator):
    """Matrices by a predictor; norms and biases are the mean of the neighbours'."""

    after: Positions

    def layers(self, shape: ModelShape) -> list[GrownLayer]:
        from entasis.grow import triples

        name = name_of(self)
        triples.check_layers(shape, name)
        places = positions.resolve(self.after, shape.n_layers, between=True, where=f"grow: {name}")
        between = {i: GrownLayer(((i, 0.5), (i + 1, 0.5)), is_new=True, made="matrices") for i in places}
        return insert(shape, between)

    def memory(self, shape: ModelShape) -> int:
        return max(self.held(M, N) + 24 * M * N for M, N in _sizes(shape))

    def temporary(self, shape: ModelShape) -> int:
        return max(self.filed(shape.n_layers, M, N) for M, N in _sizes(shape))

    def held(self, M: int, N: int) -> int:
        """Bytes of what is fitted to a matrix [M, N]: here the shared basis with its inverse, eigenvectors and their scaling."""
        return 32 * M * M

    def filed(self, layers: int, M: int, N: int) -> int:
        """Bytes that are kept in temporary files for it: here the components V of all layers."""
        return 4 * layers * M * N

    def weights(self, plan: ResizePlan, read: Read, init: Init) -> Iterator[tuple[str, torch.Tensor]]:
        old = {name: entry for name, entry in plan.parameters.items() if not plan.is_new(name)}
        new = {name: entry for name, entry in plan.parameters.items() if plan.is_new(name)}
        yield from resize.apply(dataclasses.replace(plan, parameters=old), read)
        near = self.aligned(plan, read, init)
        yield from resize.apply(dataclasses.replace(plan, parameters=new), near)
        yield from self.make(plan, near, init)

    def aligned(self, plan: ResizePlan, read: Read, init: Init) -> Read:
        """What new layers are made of: the old ones, in an order that they share where the operator gives them one."""
        return read

    def make(self, plan: ResizePlan, read: Read, init: Init) -> Iterator[tuple[str, torch.Tensor]]:
        from entasis.grow import lesa

        places = {i: layer.sources[0] for i, layer in enumerate(plan.layers) if layer.is_new}
        yield from lesa.predict_matrices(
            read,
            shape_before(plan),
            places,
            self.fit(),
            seed=init.seed,
            report=self.diagnostics,
            progress=self.told,
        )

    def fit(self) -> Fit:
        """What fits a predictor to one type of matrix."""
        raise AssertionError("each operator has its own")


@OPERATORS.register("lesa")
class Lesa(_Predicted, NetworkSettings):
    """Between layers i and i+1 matrices (U S)·G([Vᵢ; Vᵢ₊₁]): U and S from one SVD of the matrix over all layers, G a network
    that has learnt the rows of Vⱼ from [Vⱼ₋₁; Vⱼ₊₁] (LESA, 2502.13794). Train the new layers only."""

    def held(self, M: int, N: int) -> int:
        # Every parameter of the network has a gradient and two moments, and a copy of the best so far.
        return super().held(M, N) + 20 * self.hidden * (3 * N + self.hidden)

    def fit(self) -> Fit:
        from entasis.grow import predictor

        return functools.partial(predictor.fit, settings=self)


@OPERATORS.register("lesa_ridge")
class LesaRidge(_Predicted):
    """As `lesa`, with ridge regression in closed form instead of the network; its strength is chosen on held-out layers."""

    def held(self, M: int, N: int) -> int:
        return max(16 * M * M, 28 * N * N)

    def filed(self, layers: int, M: int, N: int) -> int:
        return 12 * N * N

    def fit(self) -> Fit:
        from entasis.grow import ridge

        return ridge.fit


@OPERATORS.register("aligned_lesa")
class AlignedLesa(Lesa):
    """As `lesa` or `lesa_ridge`, after heads and FFN units of all layers were matched, each layer to the one before."""

    predictor: Literal["network", "ridge"] = "network"

    def memory(self, shape: ModelShape) -> int:
        return max(super().memory(shape), matching_memory(shape))

    def held(self, M: int, N: int) -> int:
        return max(16 * M * M, 28 * N * N) if self.predictor == "ridge" else super().held(M, N)

    def filed(self, layers: int, M: int, N: int) -> int:
        return 12 * N * N if self.predictor == "ridge" else super().filed(layers, M, N)

    def aligned(self, plan: ResizePlan, read: Read, init: Init) -> Read:
        from entasis.grow import alignment, symmetry

        old, order, matched = shape_before(plan), {}, []
        for layer, how, found in alignment.chain(read, old, seed=init.seed):
            order[layer] = how
            if found:
                matched.append(found.told())
        self.diagnostics["alignment"] = matched
        return symmetry.rewriting(read, old, order)

    def fit(self) -> Fit:
        from entasis.grow import ridge

        return ridge.fit if self.predictor == "ridge" else super().fit()


def _sizes(shape: ModelShape) -> list[tuple[int, ...]]:
    """Of the matrices of one layer, which are those of every layer."""
    return [p.size for p in layout.layer_parameters(shape, 0) if p.is_matrix]
