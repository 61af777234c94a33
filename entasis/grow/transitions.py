"""Transitions: what turns one stage's model into the next one's. One registered class each.

    stages:
    - {tokens: 1M}
    - {tokens: 1M, transition: {resize: {layers: [{n_heads: 4, n_kv_heads: 2, d_ff: 256}, …], new_units: copies}}}

A transition's fields are its options. `plan` works on shapes, without torch, so that the last stage is checked before the
first step; `weights` works on tensors. Both depend on nothing but what they are given, so a transition that was killed is
done again from its start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from entasis.configuration import Settings, parse
from entasis.errors import UserError
from entasis.grow import resize
from entasis.registry import Registry, advise
from entasis.shape import layout
from entasis.shape.shapes import ModelShape, read_layers

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Init:
    """How initial values are drawn where a transition needs some; see `entasis.model.initialisation`."""

    seed: int = 0
    parametrisation: str = "standard"
    base_width: int | None = None
    nested: bool = False

    def draw(self, shape: ModelShape, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, initial value) of these parameters of a model, in fp32."""
        from entasis.model.initialisation import draw

        return draw(
            shape,
            names,
            self.seed,
            parametrisation=self.parametrisation,
            base_width=self.base_width,
            nested=self.nested,
        )


class Transition(Settings):
    """One way to change a model between stages."""

    keeps_moments: ClassVar[bool] = False
    """Whether the moments of what survives are taken over unless the stage says otherwise."""

    @property
    def diagnostics(self) -> dict[str, Any]:
        """What `weights` found out, as plain data; a list under `warnings` holds lines for the user."""
        return {}

    @classmethod
    def read(cls, options: Mapping[str, Any], where: str) -> Transition:
        """The transition with these options. Raises `UserError`, which begins with `where`."""
        return parse(cls, options, where)

    def plan(self, shape: ModelShape) -> resize.ResizePlan:
        """The next model's shape, and where each of its layers and parameters comes from. Raises `UserError`."""
        raise AssertionError("each transition has its own")

    def settle(self, plan: resize.ResizePlan, read: resize.Read, shape: ModelShape) -> resize.ResizePlan:
        """The plan once the weights, of a model of `shape`, are there; of the same new shape and the same origins."""
        return plan

    def weights(
        self, plan: resize.ResizePlan, read: resize.Read, init: Init
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every parameter of the next model, one at a time, in any order."""
        return resize.apply(plan, read)


TRANSITIONS: Registry[type[Transition]] = Registry("transition")


def read(source: Mapping[str, Any], where: str) -> Transition:
    """The transition in `{NAME: {option: value, …}}`. Raises `UserError`, which begins with `where`."""
    from entasis.grow import growth  # noqa: F401  (registers its transition)

    if len(source) != 1:
        raise UserError(f"{where} is {dict(source)!r}; name one of {', '.join(TRANSITIONS)}")
    name, options = next(iter(source.items()))
    if name not in TRANSITIONS:
        raise UserError(f"{where}: {name!r} is not known; {advise(name, TRANSITIONS)}")
    return TRANSITIONS[name].read(options, f"{where}.{name}")


@TRANSITIONS.register("resize")
class Resize(Transition):
    """From one list of layers to another: widened, cut, dropped or repeated; see `entasis.grow.resize`."""

    layers: list[dict[str, Any]] = Field(min_length=1)
    """The next model's layers, each {n_heads, n_kv_heads, d_ff}."""
    sources: list[int] | None = None
    """For each of them the layer it is made from; null: one to one."""
    new_units: Literal["zeros", "copies"] = "copies"
    """New heads and FFN units: zeros (which no gradient reaches), or copies that share out what reads them; a half that a layer
    had not is then drawn, and silent at first."""
    noise: Annotated[float, Field(ge=0, le=10)] = 0.5
    """By how much the shares of copies differ, which would learn the same for ever; as in `reshape`."""

    def plan(self, shape: ModelShape) -> resize.ResizePlan:
        return resize.plan(shape, read_layers(self.layers), sources=self.sources, new_units=self.new_units)

    def weights(
        self, plan: resize.ResizePlan, read: resize.Read, init: Init
    ) -> Iterator[tuple[str, torch.Tensor]]:
        from entasis.grow.operators import widths

        return widths.carry_out(plan, read, init, self.noise)


@TRANSITIONS.register("scale")
class Scale(Transition):
    """The matrices of some layers multiplied by a number; norms and biases stay."""

    layers: list[int] = Field(min_length=1)
    factor: Annotated[float, Field(gt=0, le=10)] = 0.9

    def plan(self, shape: ModelShape) -> resize.ResizePlan:
        if wrong := [i for i in self.layers if not 0 <= i < shape.n_layers]:
            raise UserError(f"scale: there is no layer {wrong[0]}; the model's are 0 to {shape.n_layers - 1}")
        same = resize.plan(shape, shape.layers)
        scaled = {
            p.name: replace(same.parameters[p.name], sources=((p.name, self.factor),))
            for i in self.layers
            for p in layout.layer_parameters(shape, i)
            if p.is_matrix
        }
        return replace(same, parameters={**same.parameters, **scaled})
