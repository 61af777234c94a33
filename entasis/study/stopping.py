"""When a study ends: which comparisons still need seeds, and what is known of each.

until: {detectable: 0.01, seeds: 20}

A comparison's question is answered when a difference is claimed (valid p after Holm over all that were planned), when
its sequence lies within ±margin, or when the sequence is no wider than ±`detectable`. Both sequences are simultaneous:
at α over the number of comparisons. An answered comparison gets no further seeds; none gets more than `seeds`.

Seeds count in their order. A comparison whose next seed cannot be had (a run that fails again and again) ends there:
dropping the seed would compare survivors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from entasis.errors import UserError
from entasis.study import planned_looks, sequential
from entasis.study.planned_looks import Spending
from entasis.study.sequential import Look
from entasis.study.statistics import ALPHA, Difference, holm

K = TypeVar("K", bound=Hashable)
Method = Literal["anytime", "looks"]
Answer = Literal["differs", "same", "precise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Until:
    """When a study ends, as its file says."""

    seeds: int = 20
    """The most that any comparison gets."""
    detectable: float | None = None
    """Half width of the simultaneous sequence, bits per byte, at which enough is known. Null: every comparison gets
    all seeds, and only what is claimed from them is valid whenever one looks."""
    method: Method = "anytime"
    g: float = 1.0
    """Variance of the prior of the effect in sd: at 1 differences of about one sd are found soonest."""
    looks: list[int] = field(default_factory=list)
    """Numbers of seeds at which one looks. `anytime`: after each seed, if not given; `looks`: four even ones."""
    spending: Spending = "obrien-fleming"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What is known of one comparison after its seeds so far."""

    alone: list[Look]
    """Each look at level α, as if this were the only comparison; its p is raw."""
    together: list[Look]
    """Each look at α over the number of comparisons."""
    p_holm: float
    answer: Answer | None


def schedule(until: Until, comparisons: int) -> list[int]:
    """The numbers of seeds after which one looks, the last being the most seeds.

    Raises `UserError` where not even the last look could say anything.
    """
    if until.looks:
        return sorted({n for n in until.looks if n < until.seeds} | {until.seeds})
    if until.method == "looks":
        return sorted({max(3, math.ceil(until.seeds * i / 4)) for i in (1, 2, 3)} | {until.seeds})
    first = sequential.first_look(alpha=ALPHA / comparisons, g=until.g)
    if first > until.seeds and until.detectable is not None:
        raise UserError(
            f"until.seeds is {until.seeds}; with g {until.g:g} and {comparisons} "
            f"{'comparison' if comparisons == 1 else 'comparisons'} nothing can be said before {first} seeds"
        )
    return list(range(min(first, until.seeds), until.seeds + 1))


def follow(
    differences: Sequence[float], until: Until, comparisons: int, *, alpha: float = ALPHA
) -> list[Look]:
    """What is known of one comparison at each look that its seeds reach, at the level `alpha`."""
    if until.method == "looks":
        plan = schedule(until, comparisons)
        return planned_looks.follow(differences, plan, alpha=alpha, spending=until.spending)
    return sequential.follow(differences, alpha=alpha, g=until.g)


def standings(
    differences: Mapping[K, Sequence[float]], until: Until, *, comparisons: int, margin: float
) -> dict[K, Standing]:
    """What is known of each comparison, [paired differences in the order of the seeds]; they may differ in length."""
    return _at(_followed(differences, until, comparisons), {}, until, comparisons, margin)


def needed(
    differences: Mapping[K, Sequence[float]],
    until: Until,
    *,
    comparisons: int,
    margin: float,
    ended: Collection[K] = (),
) -> dict[K, int]:
    """How many seeds each comparison has to have, as far as that can be told from those it has.

    Looks are replayed in their order, each once all open comparisons have reached it, so that a study that was killed
    goes on as if it had not been. Those in `ended` cannot get more than they have.
    """
    counts = dict.fromkeys(differences, 0)
    waiting = set(differences)
    followed = _followed(differences, until, comparisons)
    for n in schedule(until, comparisons) if until.detectable is not None else [until.seeds]:
        for name in waiting:
            counts[name] = n
        lost = {name for name in waiting if name in ended and len(differences[name]) < n}
        if any(len(differences[name]) < n for name in waiting - lost):
            return counts
        found = _at(followed, counts, until, comparisons, margin)
        waiting -= lost | {name for name in waiting if found[name].answer}
        if not waiting:
            break
    return counts


def needed_to_see(differences: Sequence[float], until: Until, comparisons: int, most: int) -> int:
    """How many seeds a positive control has to have: until it is seen, and no more than `most`, what others have."""
    if until.detectable is None:
        return most
    seen = sees(follow(differences, until, comparisons))
    for n in schedule(until, comparisons):
        if n >= most or len(differences) < n or (seen is not None and seen <= n):
            return min(n, most)
    return most


def sees(looks: Sequence[Look]) -> int | None:
    """The number of seeds at which a positive control was seen to be worse; None: not yet.

    One comparison by itself, at the level α. Its p is that of both sides: a little strict for one.
    """
    return next((look.n for look in looks if look.p <= ALPHA and look.mean > 0), None)


def expected_half_widths(until: Until, comparisons: int) -> dict[int, float]:
    """Half width of the simultaneous sequence at each look, in sd of a paired difference; infinite where it says nothing."""
    from scipy import stats

    alpha, at = ALPHA / comparisons, schedule(until, comparisons)
    if until.method == "anytime":
        return {n: sequential.half_width(n, alpha=alpha, g=until.g) for n in at}
    found = planned_looks.levels(tuple(at), alpha=alpha, spending=until.spending)
    return {
        n: float(stats.t.isf(level / 2, n - 1)) / math.sqrt(n) if level > 0 else math.inf
        for n, level in zip(at, found, strict=True)
    }


def restated(d: Difference, standing: Standing, until: Until, margin: float) -> Difference:
    """A comparison with what holds whenever one stops in place of what holds for a fixed number of seeds."""
    alone = standing.alone[-1] if standing.alone else None
    together = standing.together[-1] if standing.together else None
    inside = together is not None and _inside(together, margin)
    error = 1.96 * d.evaluation_error
    total = math.hypot(alone.half_width, error) - alone.half_width if alone else math.inf
    return dataclasses.replace(
        d,
        method=until.method,
        low=alone.low if alone else -math.inf,
        high=alone.high if alone else math.inf,
        total_low=alone.low - total if alone else -math.inf,
        total_high=alone.high + total if alone else math.inf,
        p=alone.p if alone else math.nan,
        p_holm=standing.p_holm,
        p_pooled=math.nan,
        p_pooled_holm=math.nan,
        p_equivalent=math.nan,
        p_equivalent_pooled=math.nan,
        p_equivalent_holm=math.nan,
        p_equivalent_pooled_holm=math.nan,
        detectable=together.half_width if together else math.inf,
        together_low=together.low if together else -math.inf,
        together_high=together.high if together else math.inf,
        inside=inside,
    )


def _inside(look: Look, margin: float) -> bool:
    return look.low <= look.high and -margin < look.low and look.high < margin


_Followed = tuple[list[Look], list[Look]]


def _followed(differences: Mapping[K, Sequence[float]], until: Until, comparisons: int) -> dict[K, _Followed]:
    return {
        name: (
            follow(d, until, comparisons),
            follow(d, until, comparisons, alpha=ALPHA / comparisons),
        )
        for name, d in differences.items()
    }


def _at(
    followed: Mapping[K, _Followed], counts: Mapping[K, int], until: Until, comparisons: int, margin: float
) -> dict[K, Standing]:
    """As after so many seeds each, all there are where `counts` names none."""
    cut = {
        name: tuple([look for look in looks if look.n <= counts.get(name, look.n)] for looks in both)
        for name, both in followed.items()
    }
    adjusted = holm([alone[-1].p if alone else math.nan for alone, _ in cut.values()], comparisons)
    return {
        name: Standing(alone=alone, together=together, p_holm=p, answer=_answer(together, p, until, margin))
        for (name, (alone, together)), p in zip(cut.items(), adjusted, strict=True)
    }


def _answer(together: Sequence[Look], p_holm: float, until: Until, margin: float) -> Answer | None:
    if p_holm < ALPHA:
        return "differs"
    if not together:
        return None
    last = together[-1]
    if _inside(last, margin):
        return "same"
    if until.detectable is not None and last.half_width <= until.detectable:
        return "precise"
    return None
