"""Profiles: functions that turn depth into multipliers.

A profile gives every layer a multiplier for its FFN (`d_ff = multiplier · d_model`) or for its heads
(`n_heads = multiplier · d_model / head_dim`). FFN and heads have each their own. A new profile is one registered
function `profile(n, **numbers) -> list of n multipliers`; the numbers it takes are its keyword arguments.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import create_model

from entasis.configuration import Settings, parse
from entasis.errors import UserError
from entasis.registry import Registry

Profile = Callable[..., list[float]]
PROFILES: Registry[Profile] = Registry("shape: profile")
_MOST = 10_000
DEFAULTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
"""Numbers of a profile for FFN and for heads where the user gives none."""


def register(name: str, *, ffn: dict[str, Any], heads: dict[str, Any]) -> Callable[[Profile], Profile]:
    """Makes a profile known by `name`, with its default numbers."""

    def add(profile: Profile) -> Profile:
        DEFAULTS[name] = (ffn, heads)
        return PROFILES.register(name)(profile)

    return add


def interpolate(n: int, xs: Sequence[float], ys: Sequence[float], *, curve: str = "linear") -> list[float]:
    """Values at 0 … n-1 through the control points (xs ascending, in layers)."""
    if curve not in ("linear", "cosine"):
        raise UserError(f"shape: curve is {curve!r}; choose linear or cosine")
    result = []
    for i in range(n):
        j = max(0, min(len(xs) - 2, sum(x <= i for x in xs) - 1)) if len(xs) > 1 else 0
        if len(xs) == 1 or xs[j + 1] == xs[j]:
            result.append(float(ys[j]))
            continue
        t = min(1.0, max(0.0, (i - xs[j]) / (xs[j + 1] - xs[j])))
        t = t if curve == "linear" else (1 - math.cos(math.pi * t)) / 2
        result.append(ys[j] + (ys[j + 1] - ys[j]) * t)
    return result


def _framed(values: list[float], frame: float | None) -> list[float]:
    if frame is None:
        return values
    return [frame, *values[1:-1], frame] if len(values) > 1 else [frame]


@register("isotropic", ffn={"value": 8 / 3}, heads={"value": 1.0})
def isotropic(n: int, *, value: float) -> list[float]:
    """The same multiplier in every layer."""
    return [value] * n


@register("vanilla", ffn={"start": 1.0, "end": 4.0}, heads={"start": 0.5, "end": 1.0})
def vanilla(n: int, *, start: float, end: float) -> list[float]:
    """Linear from the first layer to the last (OpenELM)."""
    return interpolate(n, [0, max(1, n - 1)], [start, end])


@register(
    "framed",
    ffn={"start": 0.5, "end": 4.0, "frame": 4.0},
    heads={"start": 0.5, "end": 1.0, "frame": 1.0},
)
def framed(n: int, *, start: float, end: float, frame: float) -> list[float]:
    """Linear and growing, the first and last layer set to `frame` (2509.06518)."""
    return _framed(vanilla(n, start=start, end=end), frame)


@register(
    "reverse",
    ffn={"start": 4.0, "end": 0.5, "frame": 4.0},
    heads={"start": 1.0, "end": 0.5, "frame": 1.0},
)
def reverse(n: int, *, start: float, end: float, frame: float) -> list[float]:
    """Linear and shrinking, the first and last layer set to `frame` (2509.06518)."""
    return _framed(vanilla(n, start=start, end=end), frame)


@register(
    "crown",
    ffn={"start": 0.5, "mid": 3.8, "end": 0.5, "frame": 4.0},
    heads={"start": 0.5, "mid": 1.0, "end": 0.5, "frame": 1.0},
)
def crown(n: int, *, start: float, mid: float, end: float, frame: float | None = None) -> list[float]:
    """Three points, widest in the middle, the first and last layer set to `frame` (2509.06518).

    The middle is one layer when n is odd and two equal ones when it is even.
    """
    peak = math.ceil(n / 2)
    if n % 2:
        values = interpolate(n, [0, max(1, peak - 1), n - 1], [start, mid, end]) if n > 1 else [mid]
    else:
        values = interpolate(n, [0, peak - 1, peak, n - 1], [start, mid, mid, end]) if n > 2 else [mid] * 2
    return _framed(values, frame)


@register("taper", ffn={"start": 4.0, "end": 4 / 3}, heads={"start": 1.0, "end": 1.0})
def taper(n: int, *, start: float, end: float) -> list[float]:
    """A half cosine from `start` down to `end` (2606.23670): end + (start - end)(1 + cos(pi l / (n-1))) / 2."""
    return interpolate(n, [0, max(1, n - 1)], [start, end], curve="cosine")


@register("middle", ffn={"value": 8 / 3 / 0.7, "share": 0.7}, heads={"value": 1.0, "share": 1.0})
def middle(n: int, *, value: float, share: float = 0.7) -> list[float]:
    """`value` in the middle `share` of the layers, 0 outside (2508.17734)."""
    if not 0 < share <= 1:
        raise UserError(f"shape: share is {share}; it must be above 0 and at most 1")
    inside = max(1, round(share * n))
    before = (n - inside) // 2
    return [value if before <= i < before + inside else 0.0 for i in range(n)]


@register(
    "points",
    ffn={"points": [[0, 8 / 3], [1, 8 / 3]], "curve": "linear"},
    heads={"points": [[0, 1.0], [1, 1.0]], "curve": "linear"},
)
def points(n: int, *, points: Sequence[Sequence[float]], curve: str = "linear") -> list[float]:
    """Any control points [depth from 0 to 1, multiplier], joined by lines or half cosines."""
    if not points or any(len(p) != 2 for p in points):
        raise UserError(f"shape: points is {points!r}; give pairs [depth from 0 to 1, multiplier]")
    depths = [p[0] for p in points]
    if depths != sorted(depths) or depths[0] < 0 or depths[-1] > 1:
        raise UserError(f"shape: the depths of points are {depths}; they must ascend within 0 and 1")
    return interpolate(n, [x * (n - 1) for x in depths], [p[1] for p in points], curve=curve)


@register("explicit", ffn={"values": []}, heads={"values": []})
def explicit(n: int, *, values: Sequence[float]) -> list[float]:
    """One multiplier for each layer."""
    if len(values) != n:
        raise UserError(f"shape: explicit has {len(values)} values for {n} layers")
    return [float(v) for v in values]


def multipliers(name: str, n: int, part: str, numbers: Mapping[str, Any]) -> list[float]:
    """The n multipliers of a profile for `part` ("ffn" or "heads"), before any rounding.

    `name` may carry a control: `crown/reversed`, `crown/shuffled:3` (a permutation of layers that depends on the
    seed and n alone, so FFN and heads of a layer move together). Raises `UserError`.
    """
    plain, _, control = name.partition("/")
    profile = PROFILES.find(plain)
    kinds = {
        p.name: (p.annotation, ...) for p in inspect.signature(profile, eval_str=True).parameters.values()
    }
    del kinds["n"]
    given = {**DEFAULTS[plain][part == "heads"], **numbers}
    # Its own annotations say what its numbers are.
    typed = parse(create_model(plain, __base__=Settings, **kinds), given, f"shape: {part} of {plain}")  # type: ignore[call-overload]
    values = profile(n, **dict(typed))
    if any(not 0 <= v <= _MOST for v in values):
        worst = min(values) if min(values) < 0 else max(values)
        raise UserError(
            f"shape: {part} of {name} has the {'negative ' if worst < 0 else ''}multiplier {worst:g}; they are from 0 to {_MOST:,}"
        )
    return _controlled(values, control)


def _controlled(values: list[float], control: str) -> list[float]:
    if not control:
        return values
    if control == "reversed":
        return values[::-1]
    kind, _, seed = control.partition(":")
    if kind != "shuffled" or not seed.isdigit():
        raise UserError(f"shape: control {control!r} is not known; write /reversed or /shuffled:SEED")
    order = list(range(len(values)))
    random.Random(int(seed)).shuffle(order)
    return [values[i] for i in order]
