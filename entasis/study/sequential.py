"""Looking after every seed, and still right: the anytime-valid t.

Stopping at the first p < 0.05 makes 28.5 % false claims in 40 looks. The e-process of the t test does not: for paired
differences with n seeds, t their one-sample statistic, ν = n - 1 and a prior δ = μ/σ ~ N(0, g) with the right-Haar
measure on σ,

    E_n = (1 + n·g)^(-1/2) · [(1 + t²/ν) / (1 + t²/(ν·(1 + n·g)))]^((ν + 1)/2)

(Gönen et al. 2005; anytime-valid by Lai 1976, Hendriksen, de Heide and Grünwald 2021, Wang and Ramdas 2023). The chance
that it ever exceeds 1/α is at most α where nothing differs, whenever and why ever one stops. `g` is fixed before the
first run.

Why our own: of the libraries with an unknown variance, savvi 0.3.1 counts one degree of freedom too few (n - 2, which
costs about a seed) and brings cvxpy; sequential-analysis 0.4.0 has the same formula, agrees with this file to 1e-13,
and is under the AGPL. ville 0.1.0 and confseq 0.0.11 hold bounded data, a known scale, or large samples only.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What is known after n seeds, in the unit of the differences."""

    n: int
    mean: float
    low: float
    high: float
    """The confidence sequence: all intervals up to here intersected. Infinite while nothing can be said; low above
    high where the intervals have nothing in common, which happens with probability α at most."""
    p: float
    """Valid whenever one stops: 1 / (the largest E up to here), at most 1."""

    @property
    def half_width(self) -> float:
        """Half of what is left of the interval; infinite where nothing is known or the intervals contradict."""
        return (self.high - self.low) / 2 if self.low <= self.high else math.inf


def e_value(differences: ArrayLike, *, g: float = 1.0) -> float:
    """Evidence against a mean of zero, 1 where there is none. Differences that are all equal and not 0 give its limit."""
    d = np.asarray(differences, dtype=np.float64)
    if d.size < 2:
        return 1.0
    return _e_value(d.size, float(d.mean()), float(((d - d.mean()) ** 2).sum()) if np.ptp(d) else 0.0, g)


def _e_value(n: int, mean: float, squares: float, g: float) -> float:
    """From the mean and the sum of squared deviations from it."""
    if n < 2 or mean == 0:
        return (1 + n * g) ** -0.5 if squares else 1.0
    prior = 1 + n * g
    if squares == 0:
        # t is infinite; the quotient tends to 1 + n·g.
        return float(prior ** ((n - 1) / 2))
    u = n * mean**2 / squares
    return math.exp(-0.5 * math.log(prior) + n / 2 * (math.log1p(u) - math.log1p(u / prior)))


@functools.cache
def half_width(n: int, *, alpha: float, g: float = 1.0) -> float:
    """Half width of the interval after n seeds, in sd of the differences; infinite while no value can be excluded."""
    if n < 2:
        return math.inf
    prior = 1 + n * g
    bound = (math.sqrt(prior) / alpha) ** (2 / n)
    if bound >= prior:
        return math.inf
    return math.sqrt((n - 1) * (bound - 1) / (1 - bound / prior) / n)


def first_look(*, alpha: float, g: float = 1.0) -> int:
    """The first number of seeds after which anything can be said: before, E cannot reach 1/α. 5 at α 0.05, g 1."""
    n = 2
    while math.isinf(half_width(n, alpha=alpha, g=g)):
        n += 1
    return n


def follow(differences: ArrayLike, *, alpha: float, g: float = 1.0) -> list[Look]:
    """What is known after 1, 2, … seeds of paired differences, given in their order."""
    mean, squares, low, high, p = 0.0, 0.0, -math.inf, math.inf, 1.0
    result = []
    for n, x in enumerate(np.asarray(differences, dtype=np.float64).tolist(), 1):
        before, mean = mean, mean + (x - mean) / n
        squares += (x - before) * (x - mean)
        width = half_width(n, alpha=alpha, g=g)
        if math.isfinite(width):
            half = width * math.sqrt(squares / (n - 1))
            low, high = max(low, mean - half), min(high, mean + half)
        p = min(p, 1 / _e_value(n, mean, squares, g))
        result.append(Look(n=n, mean=mean, low=low, high=high, p=p))
    return result
