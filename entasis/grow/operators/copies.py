"""Operators whose new layers are copies of old ones."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from entasis.errors import UserError
from entasis.grow import positions
from entasis.grow.growth import OPERATORS, GrownLayer, Operator, copy_of, insert, kept
from entasis.grow.positions import Positions
from entasis.shape.shapes import ModelShape

Amount = Annotated[int, Field(ge=1, le=1000)]


@OPERATORS.register("duplicate")
class Duplicate(Operator):
    """After layer i a copy of it; or any list of old layers (mergekit's passthrough), of which repeated ones are new."""

    after: Positions | None = None
    sources: list[int] | None = None
    """The new model's layers, as old ones: [0, 1, 2, 1, 2, 3]. Instead of `after`."""

    def layers(self, shape: ModelShape) -> list[GrownLayer]:
        where = "grow: duplicate"
        if (self.after is None) == (self.sources is None):
            raise UserError(f"{where}: give after, or sources (a list of old layers)")
        if self.after is not None:
            places = positions.resolve(self.after, shape.n_layers, where=where)
            return insert(shape, {i: copy_of(i) for i in places})
        assert self.sources is not None
        if wrong := [i for i in self.sources if not 0 <= i < shape.n_layers]:
            raise UserError(
                f"{where}: there is no layer {wrong[0]}; the model's are 0 to {shape.n_layers - 1}"
            )
        seen = [i in self.sources[:at] for at, i in enumerate(self.sources)]
        return [copy_of(i) if twice else kept(i) for i, twice in zip(self.sources, seen, strict=True)]


@OPERATORS.register("solar")
class Solar(Operator):
    """Layers 0 … n−m−1, then m … n−1 (2312.15166): 32 layers without the last and first 8 make 48. Train everything after."""

    drop: Amount = 8
    """m: layers left off the end of the first copy and the start of the second."""

    def layers(self, shape: ModelShape) -> list[GrownLayer]:
        n, m = shape.n_layers, self.drop
        if 2 * m >= n:
            raise UserError(f"grow: solar: drop is {m}; {n} layers grow only with less than {(n + 1) // 2}")
        return [
            *(kept(i) for i in range(n - m)),
            *(copy_of(i) for i in range(m, n - m)),
            *(kept(i) for i in range(n - m, n)),
        ]


@OPERATORS.register("llama_pro")
class LlamaPro(Operator):
    """After layer i a copy of it whose output projections are 0 (2401.02415); train the new ones only. Its own places are
    `blocks:8`. With reordered norms it is the norms' weights that are 0."""

    keeps_function: ClassVar[bool] = True
    after: Positions = "blocks:8"

    def layers(self, shape: ModelShape) -> list[GrownLayer]:
        places = positions.resolve(self.after, shape.n_layers, where="grow: llama_pro")
        return insert(shape, {i: copy_of(i, output=0.0) for i in places})


@OPERATORS.register("half_step")
class HalfStep(Operator):
    """Layer i twice, both with half of each update to the residual stream: one step of an ODE solver becomes two. The first
    counts as old."""

    after: Positions

    def layers(self, shape: ModelShape) -> list[GrownLayer]:
        places = positions.resolve(self.after, shape.n_layers, where="grow: half_step")
        grown = insert(shape, {i: copy_of(i, output=0.5) for i in places})
        return [
            GrownLayer(g.sources, output=0.5) if not g.is_new and g.sources[0][0] in places else g
            for g in grown
        ]


@OPERATORS.register("stack")
class Stack(Operator):
    """The whole model `times` times, one on another: layer i ← layer i mod L (G_stack, 2405.15319; StackBERT)."""

    times: Annotated[int, Field(ge=2, le=100)] = 2

    def layers(self, shape: ModelShape) -> list[GrownLayer]:
        return [copy_of(i) if g else kept(i) for g in range(self.times) for i in range(shape.n_layers)]


@OPERATORS.register("append_last")
class AppendLast(Operator):
    """Copies of the last `count` layers on top (gradual stacking, 1908.02434 and 2402.05913)."""

    count: Amount

    def layers(self, shape: ModelShape) -> list[GrownLayer]:
        n = shape.n_layers
        if self.count > n:
            raise UserError(f"grow: append_last: count is {self.count}, and there are {n} layers")
        return [*(kept(i) for i in range(n)), *(copy_of(i) for i in range(n - self.count, n))]


@OPERATORS.register("append_middle")
class AppendMiddle(Operator):
    """Of the model in blocks of `count` layers the middle block once more, right after itself (MIDAS, 2409.19044): of n
    blocks the ⌈n/2⌉-th."""

    count: Amount

    def layers(self, shape: ModelShape) -> list[GrownLayer]:
        n, b = shape.n_layers, self.count
        if n % b:
            raise UserError(
                f"grow: append_middle: {n} layers are no whole blocks of {b}; choose a count that divides {n}"
            )
        stop = ((n // b + 1) // 2) * b
        return [
            *(kept(i) for i in range(stop)),
            *(copy_of(i) for i in range(stop - b, stop)),
            *(kept(i) for i in range(stop, n)),
        ]
