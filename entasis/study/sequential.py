"""Looking after every seed, and still right: anytime-valid t, and planned looks.

Stopping at the first p < 0.05 makes 28.5 % false claims in 40 looks. Two ways that do not:

- the e-process of the t test: for paired differences with n seeds, t their one-sample statistic, ν = n - 1 and a prior
  δ = μ/σ ~ N(0, g) with the right-Haar measure on σ,
  `E_n = (1 + n·g)^(-1/2) · [(1 + t²/ν) / (1 + t²/(ν·(1 + n·g)))]^((ν + 1)/2)`
  (Gönen et al. 2005; anytime-valid by Hendriksen, de Heide and Grünwald 2021, Wang and Ramdas 2023). It may be looked
  at after every seed: the chance that it ever exceeds 1/α is at most α where nothing differs. `g` is fixed before the
  first run.
- planned looks: the level α is spent over the looks by a function fixed beforehand (Lan and DeMets 1983), which needs
  fewer seeds.

No library has the case of an unknown variance: `confseq` holds bounded or known scale.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from entasis.errors import UserError

Spending = Literal["obrien-fleming", "pocock"]
_PATHS = 200_000
"""Simulated studies from which the levels of planned looks are read: 0.05 is then known to ± 0.001."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What is known after n seeds, in the unit of the differences."""

    n: int
    mean: float
    low: float
    high: float
    """The confidence sequence: all intervals up to here intersected. Infinite while nothing can be said."""
    p: float
    """Anytime-valid: 1 / (the largest E up to here), at most 1."""


def e_value(differences: ArrayLike, *, g: float = 1.0) -> float:
    """Evidence against a mean of zero, 1 where there is none. Differences that are all equal and not 0 give infinity."""
    d = np.asarray(differences, dtype=np.float64)
    n = d.size
    if n < 2 or not d.any():
        return 1.0
    prior = 1 + n * g
    if np.ptp(d) == 0:
        # t is infinite; the quotient tends to 1 + n·g.
        return prior ** ((n - 1) / 2)
    u = n * d.mean() ** 2 / d.var(ddof=1) / (n - 1)
    return math.exp(-0.5 * math.log(prior) + n / 2 * (math.log1p(u) - math.log1p(u / prior)))


def half_width(n: int, *, alpha: float, g: float = 1.0) -> float:
    """Half width of the interval after n seeds, in sd of the differences; infinite while no value can be excluded."""
    if n < 2:
        return math.inf
    prior = 1 + n * g
    bound = (math.sqrt(prior) / alpha) ** (2 / n)
    if bound >= prior:
        return math.inf
    return math.sqrt((n - 1) * (bound - 1) / (1 - bound / prior) / n)


def follow(differences: ArrayLike, *, alpha: float, g: float = 1.0) -> list[Look]:
    """What is known after 1, 2, … seeds of paired differences, given in their order."""
    d = np.asarray(differences, dtype=np.float64)
    low, high, p = -math.inf, math.inf, 1.0
    result = []
    for n in range(1, d.size + 1):
        so_far = d[:n]
        mean = float(so_far.mean())
        width = half_width(n, alpha=alpha, g=g)
        if math.isfinite(width):
            half = width * float(so_far.std(ddof=1))
            low, high = max(low, mean - half), min(high, mean + half)
        p = min(p, 1 / e_value(so_far, g=g))
        result.append(Look(n=n, mean=mean, low=low, high=high, p=p))
    return result


def spent(fraction: float, *, alpha: float, spending: Spending) -> float:
    """How much of α may have been spent when this fraction of the seeds has been seen."""
    from scipy import stats

    if spending == "pocock":
        return alpha * math.log1p((math.e - 1) * fraction)
    return 2 * float(stats.norm.sf(stats.norm.isf(alpha / 2) / math.sqrt(fraction)))


@functools.cache
def levels(
    looks: tuple[int, ...], *, alpha: float, spending: Spending = "obrien-fleming"
) -> tuple[float, ...]:
    """For each look (numbers of seeds, ascending), the p of the t test at which a difference is claimed.

    Read from simulated studies without a difference, drawn from a fixed seed: normal theory is too liberal for few
    seeds. Raises `UserError` for looks that are not ascending numbers from 2.
    """
    from scipy import stats

    if list(looks) != sorted(set(looks)) or not looks or looks[0] < 2:
        raise UserError(
            f"until.looks are {list(looks)}; write ascending numbers of seeds from 2, as [6, 10, 16]"
        )
    draws = np.random.default_rng(20_08).standard_normal((_PATHS, looks[-1]))
    running = np.ones(_PATHS, dtype=bool)
    result = []
    for n in looks:
        x = draws[:, :n]
        p = 2 * stats.t.sf(np.abs(x.mean(1)) / (x.std(1, ddof=1) / math.sqrt(n)), n - 1)
        # Claims so far and here together may be as many as the function says.
        wanted = spent(n / looks[-1], alpha=alpha, spending=spending) * _PATHS - (~running).sum()
        here = np.sort(p[running])
        level = float(here[int(wanted) - 1]) if wanted >= 1 else 0.0
        result.append(level)
        running &= p > level
    return tuple(result)


def seeds_needed(effect: float, *, alpha: float, g: float = 1.0, most: int = 1000) -> int | None:
    """The first number of seeds whose half width is at most `effect` sd; None where `most` do not suffice."""
    return next((n for n in range(2, most + 1) if half_width(n, alpha=alpha, g=g) <= effect), None)


def claims(looks: Sequence[Look], margin: float) -> tuple[int | None, int | None]:
    """The first number of seeds at which the interval left 0 out, and at which it lay within ±margin; None: not yet."""
    differs = next((look.n for look in looks if look.low > 0 or look.high < 0), None)
    same = next((look.n for look in looks if -margin < look.low and look.high < margin), None)
    return differs, same
