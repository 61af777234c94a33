"""What every growth operator is: a model → a larger (or narrower) model, with a map of which layer came from where.

    @OPERATORS.register("average")
    class Average(Operator):
        after: Positions

        def layers(self, shape: ModelShape) -> list[GrownLayer]:
            ...

An operator is one registered class in `entasis/grow/operators/`. Its fields are its options, typed as everywhere
(`entasis.configuration.Settings`); its docstring is its rule. It is a transition (`{grow: {operator: average, after:
uniform:8}}`), and `entasis grow MODEL DIR --operator average --after uniform:8` runs the same class. It has two halves.

**On shapes**, without torch (a module of `operators/` imports it inside functions only), so that a late stage is checked
before the first step. `layers(shape)` says of every layer of the new model, in order, what it is made of: a `GrownLayer`.
An old layer comes once at most; `is_new` marks what was added. `compose` turns the list into a
`resize.ResizePlan`: the new shape, an `Origin` for every layer, a `ParameterMap` for every parameter. For most operators that is
all: copies, weighted means, silent or halved branches are maps, carried out one parameter at a time by `resize.apply`.

**On weights**. What no map can say, the operator makes. `GrownLayer(made="matrices")` leaves a new layer's matrices to it
(norms and biases are then mixed from the sources as told); `made="all"` leaves every parameter. These have maps without
sources whose `fill` is None, and `make(plan, read, init)` must yield `(name, tensor)` of each of them exactly once, **in
any order**: by matrix type over all new layers, say. `read(name)` gives one old tensor (`blocks.3.attention.query.weight`)
as it is stored; it reads from disk each time and nothing is kept, so an operator that fits something first may read all
layers' matrices of one type, one after another, as often as it likes. It keeps in memory what it fits, and yields each
tensor when it is made, in the dtype of the old model (`read("norm.weight").dtype`). What it yields follows from the weights
and `init.seed` alone: an interrupted transition is done again from its start. `self.diagnostics` may be filled on the way with
plain data (numbers, lists, dicts of them), which `entasis grow` prints and writes into `provenance.json`; a list under
`warnings` holds lines for the user. `self.told(done, total)` says how far a long fit is, to whoever gave `tell` a function.

`settle(plan, read, shape)` is for the rare plan that depends on weights, as the order in which a layer's units are cut does: it
returns a plan of the same shape and origins, and is called once before anything is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import PrivateAttr

from entasis.configuration import parse
from entasis.errors import UserError
from entasis.grow import resize
from entasis.grow.resize import NewUnits, Order, Origin, ParameterMap, Read, ResizePlan
from entasis.grow.transitions import TRANSITIONS, Init, Transition
from entasis.registry import Registry
from entasis.shape import layout
from entasis.shape.shapes import LayerShape, ModelShape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GrownLayer:
    """What one layer of the grown model is made of."""

    sources: tuple[tuple[int, float], ...] = ()
    """(old layer, its share); several are mixed, and must then be of one shape. None: `made` is all."""
    is_new: bool = False
    shape: LayerShape | None = None
    """None: the first source's."""
    output: float = 1.0
    """What both branches write into the residual stream is multiplied by this; at 0 the layer is silent."""
    made: Literal["none", "matrices", "all"] = "none"
    """Which parameters `Operator.make` yields instead."""

    @property
    def is_kept(self) -> bool:
        """Whether this is an old layer as it was."""
        return not self.is_new and self.shape is None and self.output == 1.0


def kept(layer: int) -> GrownLayer:
    """The old layer, as it was."""
    return GrownLayer(((layer, 1.0),))


def copy_of(layer: int, *, output: float = 1.0) -> GrownLayer:
    """A new layer with an old one's weights."""
    return GrownLayer(((layer, 1.0),), is_new=True, output=output)


def insert(shape: ModelShape, new: Mapping[int, GrownLayer]) -> list[GrownLayer]:
    """All old layers, and after each one that `new` names what it says."""
    return [x for i in range(shape.n_layers) for x in (kept(i), *([new[i]] if i in new else []))]


class Operator(Transition):
    """A growth operator; see the module's docstring."""

    keeps_moments: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = False
    """Whether every grown model computes what the old one did."""
    _diagnostics: dict[str, Any] = PrivateAttr(default_factory=dict)

    _tell: Callable[[int, int], None] | None = PrivateAttr(default=None)

    def tell(self, progress: Callable[[int, int], None]) -> None:
        """`progress` is called with the part of the fitting done and the whole of it, as `weights` goes on."""
        self._tell = progress

    def told(self, done: int, total: int) -> None:
        """Passes on how far `make` is."""
        if self._tell:
            self._tell(done, total)

    @property
    def diagnostics(self) -> dict[str, Any]:
        """What `make` found out, as plain data."""
        return self._diagnostics

    def computes_the_same(self, shape: ModelShape) -> bool:
        """Whether the model that becomes of one of `shape` computes what that did."""
        return self.keeps_function

    def layers(self, shape: ModelShape) -> list[GrownLayer]:
        """What every layer of the new model is made of. Raises `UserError`."""
        raise AssertionError("each operator has its own")

    def memory(self, shape: ModelShape) -> int:
        """About the most bytes that is held to fit something to a model of `shape`."""
        return 0

    def temporary(self, shape: ModelShape) -> int:
        """The most bytes that it keeps in temporary files meanwhile."""
        return 0

    def make(self, plan: ResizePlan, read: Read, init: Init) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every parameter that the plan leaves to the operator, in any order."""
        return iter(())

    def plan(self, shape: ModelShape) -> ResizePlan:
        return compose(shape, self.layers(shape), name_of(self))

    def weights(self, plan: ResizePlan, read: Read, init: Init) -> Iterator[tuple[str, torch.Tensor]]:
        yield from resize.apply(plan, read)
        yield from self.make(plan, read, init)


OPERATORS: Registry[type[Operator]] = Registry("grow: operator")


def name_of(operator: Operator) -> str:
    """The name that an operator is registered by."""
    return next(name for name, kind in OPERATORS.items() if type(operator) is kind)


def read_operator(name: str, options: Mapping[str, Any], where: str) -> Operator:
    """The operator called `name` with its options. Raises `UserError`, which begins with `where`."""
    from entasis.grow import operators  # noqa: F401  (registers them)

    return parse(OPERATORS.find(name), options, where)


@TRANSITIONS.register("grow")
class Grow(Transition):
    """A growth operator by its name, with its options: `{grow: {operator: llama_pro, after: uniform:8}}`."""

    @classmethod
    def read(cls, options: Mapping[str, Any], where: str) -> Transition:
        if not isinstance(options, Mapping) or "operator" not in options:
            raise UserError(
                f"{where}: operator is missing; name one, as in {{operator: llama_pro, after: uniform:8}}"
            )
        rest = {key: value for key, value in options.items() if key != "operator"}
        return read_operator(options["operator"], rest, where)


def compose(
    shape: ModelShape,
    layers: Sequence[GrownLayer],
    operator: str,
    *,
    orders: Mapping[int, Order] | None = None,
    new_units: NewUnits = "copies",
) -> ResizePlan:
    """The plan of a model of these layers; layers of another shape than their source are widened or cut, which the operator's
    `weights` then carry out by `operators.widths.carry_out`.

    `orders` and `new_units` are `resize.plan`'s. Raises `UserError` naming operator and layer.
    """
    where = f"grow: {operator}"
    old = [g.sources[0][0] for g in layers if not g.is_new]
    assert len(old) == len(set(old)), f"{operator}: an old layer is there twice"
    drawn = [g.shape or shape.layers[g.sources[0][0]] for g in layers]
    new = dataclasses.replace(shape, layers=tuple(drawn))
    parameters: dict[str, ParameterMap] = {}
    for i, grown in enumerate(layers):
        if len({shape.layers[source] for source, _ in grown.sources}) > 1 and grown.made != "all":
            raise UserError(f"{where}: {_differ(shape, grown)}")
        found = [
            resize.map_layer(shape, source, new, i, (orders or {}).get(source, Order()), new_units)
            for source, _ in (grown.sources if grown.made != "all" else ())
        ]
        for p in layout.layer_parameters(new, i):
            parameters[p.name] = _map(shape, grown, p, [maps[p.name] for maps in found])
    origins = tuple(
        Origin(tuple(s for s, _ in g.sources), None if g.is_kept else operator, g.is_new) for g in layers
    )
    return ResizePlan(new, origins, resize.with_outer(new, parameters))


def _map(
    shape: ModelShape, grown: GrownLayer, p: layout.Parameter, found: list[ParameterMap]
) -> ParameterMap:
    """Where one parameter of a layer comes from."""
    factor = grown.output if resize.is_output(shape, p) else 1.0
    if factor == 0.0:
        return ParameterMap((), p.size, fill=0.0)
    if grown.made == "all" or (grown.made == "matrices" and p.is_matrix):
        return ParameterMap((), p.size, fill=None)
    sources = []
    for (_, share), entry in zip(grown.sources, found, strict=True):
        sources += [(name, one * share * factor) for name, one in entry.sources]
    return dataclasses.replace(found[0], sources=tuple(sources))


def _differ(shape: ModelShape, grown: GrownLayer) -> str:
    """Which sources cannot be mixed, in words."""
    (first, _), *rest = grown.sources
    other = next(i for i, _ in rest if shape.layers[i] != shape.layers[first])
    two = [(i, shape.layers[i], layout.ffn_kind(shape, shape.layers[i]).name) for i in (first, other)]
    differ = len({kind for *_, kind in two}) > 1
    a, b = (
        f"layer {i} has {x.n_heads} heads on {x.n_kv_heads} KV heads and d_ff {x.d_ff}{f' of {kind}' if differ else ''}"
        for i, x, kind in two
    )
    return (
        f"{a}, {b}; only equal layers can be mixed: choose other places, or duplicate, llama_pro or half_step"
    )
