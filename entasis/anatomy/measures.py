"""The registry of measures: one registered function each.

    @measure("stream", kind="structure", gives={"block_influence": "1 − cos(x_l, x_{l+1})", …})
    def stream(subject: Subject) -> Iterator[Row]: …

A measure gives one or more quantities; a row is one value of one quantity for one layer, or for one matrix of it, one
other layer or the whole model. From then on `dissect`, the command line, the report and the docs know it.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from entasis.errors import UserError
from entasis.registry import Registry, advise

if TYPE_CHECKING:
    from entasis.anatomy.subject import Subject
    from entasis.shape.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class Row:
    """One value. `layer` is None for the whole model; `target` names a matrix, another layer or a setting.

    `low` and `high` are a 95 % interval; `p` is adjusted by Holm over the layers of the quantity.
    """

    quantity: str
    layer: int | None
    value: float
    target: str = ""
    low: float | None = None
    high: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Measure:
    name: str
    kind: str
    gives: Mapping[str, str]
    """Quantities and what they say, with unit."""
    function: Callable[[Subject], Iterable[Row]]
    lacks: Callable[[ModelShape], str | None] | None = None
    """Why it has no value for any layer of a shape; None where it has one."""


Function = Callable[["Subject"], Iterable[Row]]
MEASURES: Registry[Measure] = Registry("measure")


def measure(
    name: str,
    *,
    kind: str,
    gives: Mapping[str, str],
    lacks: Callable[[ModelShape], str | None] | None = None,
) -> Callable[[Function], Function]:
    """Registers a measure under `name`."""

    def add(function: Function) -> Function:
        MEASURES.register(name)(Measure(name, kind, gives, function, lacks))
        return function

    return add


def load_measures() -> Registry[Measure]:
    """All measures: imports every module of `diagnostics` first."""
    from entasis.anatomy import diagnostics

    for module in pkgutil.iter_modules(diagnostics.__path__):
        importlib.import_module(f"{diagnostics.__name__}.{module.name}")
    return MEASURES


def choose(names: Sequence[str]) -> list[Measure]:
    """The measures called `names`; the name of a kind means all of that kind, `all` means all. Raises `UserError`."""
    found = load_measures()
    kinds = list(dict.fromkeys(m.kind for m in found.values()))
    chosen: dict[str, Measure] = {}
    for name in names:
        group = {n: m for n, m in found.items() if name in (n, m.kind, "all")}
        if not group:
            raise UserError(f"measure {name!r} is not known; {advise(name, [*found, *kinds, 'all'])}")
        chosen.update(group)
    return list(chosen.values())


def leave_out_impossible(
    measures: Sequence[Measure], names: Sequence[str], shape: ModelShape
) -> list[Measure]:
    """Those of `measures` that have a value for some layer of the shape; which are left out is said on stderr.

    Raises `UserError` for one that `names` has by its own name, not by its kind.
    """
    kept = []
    for m in measures:
        reason = m.lacks(shape) if m.lacks else None
        if reason and m.name in names:
            raise UserError(f"--measures {m.name}: {reason}")
        if reason:
            print(f"entasis: {m.name} is left out: {reason}", file=sys.stderr)
        else:
            kept.append(m)
    return kept
