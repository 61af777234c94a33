"""Hitting a budget without bending the profile.

A profile says how layers relate; a budget says how much there is in all. The solver multiplies one common factor
into the FFN multipliers (or the heads', or both) until the cost meets the budget, rounding every layer as the
policy says. Rounding leaves a miss; where moving one group of equal layers by a single rounding step makes it
smaller and does not change the order of the layers, that is done and said. The silhouette changes in no other way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from entasis.errors import UserError
from entasis.shape import cost, fields
from entasis.shape.rounding import Rounding
from entasis.shape.shapes import LayerShape, ModelShape

TOLERANCE = 0.001
"""A miss above 0.1 % is explained."""


@dataclass(frozen=True)
class Budget:
    """A number to hit: what is counted, how much, and at which sequence length FLOPs are counted."""

    kind: str
    value: int
    sequence: int = 1024

    def __post_init__(self) -> None:
        if self.kind not in MEASURES:
            raise UserError(f"shape: budget {self.kind!r} is not known; choose one of {', '.join(MEASURES)}")
        if self.value < 1:
            raise UserError(f"shape: the budget of {self.kind} is {self.value}; it must be above 0")

    def measure(self, shape: ModelShape) -> int:
        return MEASURES[self.kind](shape, self.sequence)


MEASURES: dict[str, Callable[[ModelShape, int], int]] = {
    "parameters": lambda shape, _: cost.parameters(shape),
    "parameters_without_input_embedding": lambda shape, _: cost.parameters_without_input_embedding(shape),
    "flops_per_token": lambda shape, sequence: cost.flops_per_token(shape, sequence),
    "kv_bytes_per_token": lambda shape, _: cost.kv_bytes_per_token(shape),
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
        for f, a in zip(self.ffn, self.heads, strict=True):
            f, a = f * ffn_factor, a * head_factor
            if self.rounding.two_decimals:
                f, a = round(f, 2), round(a, 2)
            heads = self.rounding.heads(a * d / k) if a > 0 else 0
            kv = min(heads, self.n_kv_heads) if self.n_kv_heads else heads // self.q_per_kv
            layers.append(LayerShape(heads, kv, self.rounding.ffn(f * d) if f > 0 else 0))
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
    for i in sorted(costs, key=lambda i: abs(math.log(costs[i] / budget.value))):
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
    if smallest > budget.value * (1 + TOLERANCE):
        raise UserError(
            f"shape: {budget.kind} {budget.value:,} is too small: with d_model {silhouette.template.d_model} and "
            f"{len(silhouette.ffn)} layers everything but what is solved for costs {smallest:,}"
        )
    while budget.measure(build(high)) < budget.value:
        high *= 2
        if high > 1e9:
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
    if scale == "ffn" and silhouette.rounding.name in ("crown-paper", "corenet"):
        floor = silhouette.rounding.ffn_multiple
        if any(
            x.d_ff == floor and f * factor * shape.d_model < floor * 0.75
            for x, f in zip(shape.layers, silhouette.ffn, strict=True)
        ):
            notes.append(
                f"the narrowest layers are held at {silhouette.rounding.name}'s smallest FFN, {floor}"
            )
    return replace(solution, notes=(*notes, *flattened(silhouette, shape))), factor


def _adjust(shape: ModelShape, silhouette: Silhouette, budget: Budget) -> tuple[ModelShape, list[str]]:
    """Moves one group of equal layers by one rounding step where that lessens the miss and keeps the order."""
    cost_now = budget.measure(shape)
    best_miss, change = abs(cost_now - budget.value), None

    def alone(layer: LayerShape) -> int:
        return budget.measure(replace(shape, layers=(layer,)))

    counts = Counter(shape.layers)
    for layer, n in sorted(counts.items(), key=lambda x: x[0].d_ff):
        if not layer.d_ff or n == shape.n_layers:
            continue
        others = {x.d_ff for x in counts if x != layer}
        for step in (silhouette.rounding.ffn_multiple, -silhouette.rounding.ffn_multiple):
            moved = replace(layer, d_ff=layer.d_ff + step)
            crossed = any((o > layer.d_ff) != (o > moved.d_ff) or o == moved.d_ff for o in others)
            if moved.d_ff < silhouette.rounding.ffn_multiple or crossed:
                continue
            miss = abs(cost_now + n * (alone(moved) - alone(layer)) - budget.value)
            if miss < best_miss:
                best_miss, change = miss, (layer, moved)
    if change is None:
        return shape, []
    layer, moved = change
    members = [i for i, x in enumerate(shape.layers) if x == layer]
    note = f"layer {', '.join(map(str, members))}: FFN {layer.d_ff} → {moved.d_ff}, one rounding step, to meet the budget"
    return replace(shape, layers=tuple(moved if x == layer else x for x in shape.layers)), [note]


def _why(solution: Solution, silhouette: Silhouette, scale: str) -> str:
    assert solution.budget is not None
    rounding = silhouette.rounding
    step = (
        f"FFN steps of {rounding.ffn_multiple}"
        if scale == "ffn"
        else f"head steps of {rounding.head_multiple}"
    )
    together = " in all layers at once" if solution.shape.uniform else ""
    return (
        f"misses {solution.budget.kind} {solution.budget.value:,} by {solution.miss:+.2%}: rounding "
        f"{rounding.name} moves in {step}{together}"
    )


def isotropic_of_equal_cost(shape: ModelShape, kind: str = "parameters", sequence: int = 1024) -> Solution:
    """The model of equal layers, same depth and width, that costs what `shape` costs.

    Every layer gets the mean number of heads (in whole KV groups) and the FFN that meets the cost. Raises `UserError` for
    layers that have more than heads and widths, for which there is no mean.
    """
    from entasis.shape.rounding import policy

    fields.require(shape.layers, "equal layers of equal cost")
    n = shape.n_layers
    kv = max(1, round(sum(x.n_kv_heads for x in shape.layers) / n))
    heads = max(kv, round(sum(x.n_heads for x in shape.layers) / n / kv) * kv)
    rounding = policy("exact", head_dim=shape.head_dim, group=kv, ffn_multiple=None, device="other")
    silhouette = Silhouette(
        [1.0] * n, [heads * shape.head_dim / shape.d_model] * n, rounding, kv, template=shape
    )
    budget = Budget(kind, MEASURES[kind](shape, sequence), sequence)
    return solve(silhouette, budget, "heads" if kind == "kv_bytes_per_token" else "ffn")[0]
