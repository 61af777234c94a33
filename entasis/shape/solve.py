"""Hitting a budget without bending the profile.

A profile says how layers relate; a budget says how much there is in all. The solver multiplies one common factor
into the FFN multipliers (or the heads', or both) until the cost meets the budget, rounding every layer as the
policy says. Rounding leaves a miss; where moving all layers of one FFN width by a single rounding step makes it
smaller and does not change the order of the layers, that is done and said. The silhouette changes in no other way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from entasis.errors import UserError
from entasis.shape import cost, fields
from entasis.shape.rounding import Rounding
from entasis.shape.shapes import MOST, LayerShape, ModelShape

TOLERANCE = 0.001
"""A miss above 0.1 % is explained."""


@dataclass(frozen=True)
class Budget:
    """A number to hit: what is counted, how much, and at which sequence length and attended length FLOPs are counted."""

    kind: str
    value: int
    sequence: int = 1024
    attended: cost.Attended = "full"

    def __post_init__(self) -> None:
        if self.kind not in MEASURES:
            raise UserError(f"shape: budget {self.kind!r} is not known; choose one of {', '.join(MEASURES)}")
        if self.value < 1:
            raise UserError(f"shape: the budget of {self.kind} is {self.value}; it must be above 0")
        if not 1 <= self.sequence <= MOST:
            raise UserError(f"shape: budget.sequence is {self.sequence}; it must be from 1 to {MOST:,}")
        if self.attended not in get_args(cost.Attended):
            raise UserError(
                f"shape: budget.attended is {self.attended!r}; choose {' or '.join(get_args(cost.Attended))}"
            )

    def measure(self, shape: ModelShape) -> int:
        return MEASURES[self.kind](shape, self.sequence, self.attended)


MEASURES: dict[str, Callable[[ModelShape, int, cost.Attended], int]] = {
    "parameters": lambda shape, *_: cost.parameters(shape),
    "parameters_without_input_embedding": lambda shape, *_: cost.parameters_without_input_embedding(shape),
    "flops_per_token": lambda shape, sequence, attended: cost.flops_per_token(
        shape, sequence, attended=attended
    ),
    "kv_bytes_per_token": lambda shape, *_: cost.kv_bytes_per_token(shape),
}


@dataclass(frozen=True)
class Solution:
    """A shape, what was asked of it, and what was missed and why."""

    shape: ModelShape
    budget: Budget | None = None
    notes: tuple[str, ...] = ()

    @property
    def achieved(self) -> int | None:
        return self.budget.measure(self.shape) if self.budget else None

    @property
    def miss(self) -> float:
        """Signed, as a fraction of the budget; 0 without one."""
        return self.budget.measure(self.shape) / self.budget.value - 1 if self.budget else 0.0


@dataclass(frozen=True)
class Silhouette:
    """Multipliers of every layer and how they become layers."""

    ffn: Sequence[float]
    heads: Sequence[float]
    rounding: Rounding
    n_kv_heads: int | None
    """Fixed in every layer; None keeps the ratio `q_per_kv`."""
    q_per_kv: int = 1
    template: ModelShape = field(repr=False, kw_only=True)
    """Everything of the model shape but its layers."""

    def shape(self, ffn_factor: float = 1.0, head_factor: float = 1.0) -> ModelShape:
        d, k = self.template.d_model, self.template.head_dim
        layers = []
        for ffn, attention in zip(self.ffn, self.heads, strict=True):
            f, a = ffn * ffn_factor, attention * head_factor
            if self.rounding.two_decimals:
                f, a = round(f, 2), round(a, 2)
            # Only a profile's own 0 leaves a part out; a small factor makes it as narrow as the rounding allows.
            heads = self.rounding.heads(a * d / k) if attention > 0 else 0
            kv = min(heads, self.n_kv_heads) if self.n_kv_heads else heads // self.q_per_kv
            layers.append(LayerShape(heads, kv, self.rounding.ffn(f * d) if ffn > 0 else 0))
        return replace(self.template, layers=tuple(layers))


def flattened(silhouette: Silhouette, shape: ModelShape) -> list[str]:
    """A note for the FFN and for the heads, where their multipliers differ and rounding made all layers equal."""
    notes = []
    rounding = silhouette.rounding
    for what, multipliers, widths, step in (
        ("FFN widths", silhouette.ffn, [x.d_ff for x in shape.layers], rounding.ffn_multiple),
        ("heads", silhouette.heads, [x.n_heads for x in shape.layers], rounding.head_multiple),
    ):
        wanted, got = {m for m in multipliers if m > 0}, {w for w in widths if w}
        if len(wanted) > 1 and len(got) == 1:
            notes.append(
                f"the silhouette of the {what} is lost: multipliers from {min(wanted):.3g} to {max(wanted):.3g} all round "
                f"to {got.pop()} in steps of {step}"
            )
    return notes


def nearest(silhouettes: Sequence[Silhouette], budget: Budget, scale: str) -> Solution:
    """Of several, the one whose own multipliers meet the budget with the least factor. Raises `UserError`.

    The cost grows with the factor, so one whose factor is further from 1 than the best so far is known by its cost there;
    those that cost about the budget as they are come first.
    """
    costs: dict[int, int] = {}
    complaints: dict[int, UserError] = {}
    for i, silhouette in enumerate(silhouettes):
        try:
            costs[i] = budget.measure(_build(silhouette, scale, 1.0))
        except UserError as error:
            complaints[i] = error
    best: tuple[float, int, Solution] | None = None
    # Without attention there is no KV cost, and of 0 no logarithm.
    for i in sorted(costs, key=lambda i: abs(math.log(max(1, costs[i]) / budget.value))):
        if best and not _within(silhouettes[i], budget, scale, best[0]):
            continue
        try:
            solution, factor = solve(silhouettes[i], budget, scale)
        except UserError as error:
            complaints[i] = error
            continue
        bent = abs(math.log(factor)) + (abs(solution.miss) if abs(solution.miss) > TOLERANCE else 0) * 100
        if best is None or (bent, i) < best[:2]:
            best = (bent, i, solution)
    if best is None:
        raise complaints[max(complaints)]
    return best[2]


def _within(silhouette: Silhouette, budget: Budget, scale: str, bent: float) -> bool:
    """Whether the factor that meets the budget can lie within exp(±bent)."""
    factor = math.exp(min(bent, 20.0))
    return (
        budget.measure(_build(silhouette, scale, 1 / factor)) <= budget.value
        and budget.measure(_build(silhouette, scale, factor)) >= budget.value
    )


def _build(silhouette: Silhouette, scale: str, factor: float) -> ModelShape:
    if scale not in ("ffn", "heads", "both"):
        raise UserError(f"shape: scale is {scale!r}; choose ffn, heads or both")
    return silhouette.shape(factor if scale != "heads" else 1.0, factor if scale != "ffn" else 1.0)


def solve(silhouette: Silhouette, budget: Budget, scale: str) -> tuple[Solution, float]:
    """The shape of this silhouette nearest to the budget, and the common factor that gave it.

    `scale` is "ffn", "heads" or "both": whose multipliers carry the factor. Raises `UserError` when even the
    smallest shape costs more than the budget.
    """

    def build(factor: float) -> ModelShape:
        return _build(silhouette, scale, factor)

    low, high = 1e-6, 1.0
    smallest = budget.measure(build(low))
    if budget.kind == "kv_bytes_per_token" and silhouette.n_kv_heads and smallest != budget.value:
        raise UserError(
            f"shape: {budget.kind} {budget.value:,} cannot be solved for: n_kv_heads {silhouette.n_kv_heads} alone "
            f"sets it, {smallest:,} in {len(silhouette.heads)} layers; leave one of the two out"
        )
    if smallest > budget.value * (1 + TOLERANCE):
        raise UserError(
            f"shape: {budget.kind} {budget.value:,} is too small: with d_model {silhouette.template.d_model} and "
            f"{len(silhouette.ffn)} layers it is {smallest:,} with all that is solved for at its least"
        )
    while budget.measure(build(high)) < budget.value:
        high *= 2
        if high > 1e9 or not _grows(silhouette, budget, scale):
            raise UserError(f"shape: {budget.kind} does not grow with {scale}; choose another `scale`")
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if budget.measure(build(middle)) <= budget.value else (low, middle)
    candidates = [(abs(budget.measure(build(f)) - budget.value), f) for f in (low, high)]
    _, factor = min(candidates)
    shape, notes = build(factor), list[str]()
    if scale != "heads":
        shape, notes = _adjust(shape, silhouette, budget)
    solution = Solution(shape, budget, tuple(notes))
    if abs(solution.miss) > TOLERANCE:
        notes.append(_why(solution, silhouette, scale))
    if scale != "heads" and silhouette.rounding.name in ("crown-paper", "corenet"):
        floor = silhouette.rounding.ffn_multiple
        if any(
            x.d_ff == floor and f * factor * shape.d_model < floor * 0.75
            for x, f in zip(shape.layers, silhouette.ffn, strict=True)
        ):
            notes.append(
                f"the narrowest layers are held at {silhouette.rounding.name}'s smallest FFN, {floor}"
            )
    return replace(solution, notes=(*notes, *flattened(silhouette, shape))), factor


def _grows(silhouette: Silhouette, budget: Budget, scale: str) -> bool:
    """Whether something carries the factor that the budget counts, as a KV cache does no FFN."""
    in_ffn = scale != "heads" and budget.kind != "kv_bytes_per_token" and any(silhouette.ffn)
    return in_ffn or (scale != "ffn" and any(silhouette.heads))


def _adjust(shape: ModelShape, silhouette: Silhouette, budget: Budget) -> tuple[ModelShape, list[str]]:
    """Moves the layers of one FFN width by one rounding step where that lessens the miss and keeps the order.

    Where all have the same width nothing is moved: that would be the factor's work, and it is done.
    """
    widths = Counter(x.d_ff for x in shape.layers if x.d_ff)
    if len(widths) == 1:
        return shape, []
    cost_now = budget.measure(shape)
    best_miss, change = abs(cost_now - budget.value), None

    def alone(d_ff: int) -> int:
        # What an FFN costs does not depend on the layer's heads.
        return budget.measure(replace(shape, layers=(replace(shape.layers[0], d_ff=d_ff),)))

    for width, n in sorted(widths.items()):
        for step in (silhouette.rounding.ffn_multiple, -silhouette.rounding.ffn_multiple):
            moved = width + step
            crossed = any((o > width) != (o > moved) or o == moved for o in widths if o != width)
            if moved < silhouette.rounding.ffn_multiple or crossed:
                continue
            miss = abs(cost_now + n * (alone(moved) - alone(width)) - budget.value)
            if miss < best_miss:
                best_miss, change = miss, (width, moved)
    if change is None:
        return shape, []
    width, moved = change
    members = [i for i, x in enumerate(shape.layers) if x.d_ff == width]
    note = (
        f"layer {', '.join(map(str, members))}: FFN {width} → {moved}, one rounding step, to meet the budget"
    )
    layers = tuple(replace(x, d_ff=moved) if x.d_ff == width else x for x in shape.layers)
    return replace(shape, layers=layers), [note]


def _why(solution: Solution, silhouette: Silhouette, scale: str) -> str:
    assert solution.budget is not None
    rounding, layers = silhouette.rounding, solution.shape.layers
    ffn, heads = f"FFN steps of {rounding.ffn_multiple}", f"head steps of {rounding.head_multiple}"
    scaled: dict[str, tuple[str, set[object]]] = {
        "ffn": (ffn, {x.d_ff for x in layers}),
        "heads": (heads, {x.n_heads for x in layers}),
        "both": (f"{ffn} and {heads}", set(layers)),
    }
    steps, widths = scaled[scale]
    together = " in all layers at once" if len(widths) == 1 else ""
    return (
        f"misses {solution.budget.kind} {solution.budget.value:,} by {solution.miss:+.2%}: rounding "
        f"{rounding.name} moves in {steps}{together}"
    )


def isotropic_of_equal_cost(
    shape: ModelShape,
    kind: str = "parameters",
    sequence: int = 1024,
    attended: cost.Attended = "full",
) -> Solution:
    """The model of equal layers, same depth and width, that costs what `shape` costs.

    Every layer gets the mean number of heads (in whole KV groups) and the FFN that meets the cost; for a KV cost, which
    no FFN changes, the mean width. Raises `UserError` for layers that have more than heads and widths, for which there
    is no mean.
    """
    from entasis.shape.rounding import policy

    fields.require(shape.layers, "equal layers of equal cost")
    n = shape.n_layers
    kv = max(1, round(sum(x.n_kv_heads for x in shape.layers) / n))
    heads = max(kv, round(sum(x.n_heads for x in shape.layers) / n / kv) * kv)
    budget = Budget(kind, MEASURES[kind](shape, sequence, attended), sequence, attended)
    if kind == "kv_bytes_per_token":
        mean = LayerShape(heads, kv, round(sum(x.d_ff for x in shape.layers) / n))
        solution = Solution(replace(shape, layers=(mean,) * n), budget)
        if abs(solution.miss) <= TOLERANCE:
            return solution
        note = f"misses {kind} {budget.value:,} by {solution.miss:+.2%}: {kv} in every layer is the nearest number of KV heads"
        return replace(solution, notes=(note,))
    rounding = policy("exact", head_dim=shape.head_dim, group=kv, ffn_multiple=None, device=None)
    silhouette = Silhouette(
        [1.0] * n, [heads * shape.head_dim / shape.d_model] * n, rounding, kv, template=shape
    )
    return solve(silhouette, budget, "ffn")[0]
