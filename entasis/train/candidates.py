"""The settings that `auto` chooses among, what was measured of each, and which is taken. Needs no torch.

A candidate is taken only where it saves more than 5 % against every simpler one: fp32 comes before bf16, sdpa before
plain, eager before compiled. So noise does not decide between equals, and the same machine chooses the same again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

MARGIN = 0.05
"""A tie: saving no more of the time than this is not worth being less simple."""


class Settings(NamedTuple):
    """How a step is computed."""

    precision: Literal["fp32", "bf16"]
    attention: Literal["sdpa", "plain", "flex"]
    compile: bool

    def __str__(self) -> str:
        return f"{self.precision} {self.attention}{' compiled' if self.compile else ''}"

    @property
    def simplicity(self) -> tuple[bool, bool, bool]:
        """Sorts the simplest first."""
        return (self.compile, self.attention == "plain", self.precision == "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One candidate's optimizer step, in seconds."""

    settings: Settings
    fastest: float
    """Of its shortest parts: other work on the machine only adds to it."""
    median: float
    """What a run takes on a machine as busy as it was."""
    compilation: float
    """Seconds that its first step took, if it was compiled, for each of the run's models; else 0."""
    rounds: int

    def seconds(self, steps: float) -> tuple[float, float]:
        """Of a run of so many steps, compilation included: by its shortest steps, and by their median."""
        return steps * self.fastest + self.compilation, steps * self.median + self.compilation

    def plain(self) -> dict[str, Any]:
        """As it stands in `environment.json` and `machine.json`."""
        numbers = ("fastest", "median", "compilation", "rounds")
        return {**self.settings._asdict(), **{k: getattr(self, k) for k in numbers}}


def from_plain(plain: Mapping[str, Any]) -> Measured:
    """What `Measured.plain` gave."""
    rest = dict(plain)
    return Measured(settings=Settings(*(rest.pop(k) for k in Settings._fields)), **rest)


def fastest(seconds: Mapping[Settings, Sequence[float]]) -> Settings:
    """The candidate that takes the least seconds by every figure given of it; of those within the margin the simplest.

    On a busy machine the shortest steps alone, or their medians alone, may say otherwise for once; both seldom do.
    """
    simplest_first = sorted(seconds, key=lambda s: s.simplicity)
    taken = simplest_first[0]
    for settings in simplest_first[1:]:
        if all(a < (1 - MARGIN) * b for a, b in zip(seconds[settings], seconds[taken], strict=True)):
            taken = settings
    return taken


def told(measured: Sequence[Mapping[str, Any]]) -> str:
    """The timings in a line, the fastest first: `bf16 sdpa 79 ms, fp32 sdpa 47 ms`."""
    rows = sorted(map(from_plain, measured), key=lambda m: m.fastest)
    return ", ".join(f"{m.settings} {_duration(m.fastest)}" for m in rows)


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
