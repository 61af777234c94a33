"""Planned looks: the level α is spent over numbers of seeds that are fixed beforehand (Lan and DeMets 1983).

Fewer seeds than the anytime-valid t (`sequential`) where one knows when one will look. With few seeds normal theory is
too liberal, so the boundary is set on the p values of the t test, and read from simulated studies without a difference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from entasis.errors import UserError
from entasis.study.sequential import Look

Spending = Literal["obrien-fleming", "pocock"]
_PATHS = 200_000
"""Simulated studies from which the levels are read: 0.05 is then known to ± 0.001."""
_LEAST, _STEP = 1e-4, 1.02
"""Levels at which a p is looked up: it is rounded up by 2 % at most, and none is below the least."""


def spent(fraction: float, *, alpha: float, spending: Spending) -> float:
    """How much of α may have been spent when this fraction of the seeds has been seen.

    `2 - 2Φ(z/√f)` (O'Brien and Fleming's, nearly) keeps it for the end, `α·ln(1 + (e - 1)·f)` (Pocock's) does not.
    """
    from scipy import stats

    if spending == "pocock":
        return alpha * math.log1p((math.e - 1) * fraction)
    return 2 * float(stats.norm.sf(stats.norm.isf(alpha / 2) / math.sqrt(fraction)))


@functools.cache
def levels(
    looks: tuple[int, ...], *, alpha: float, spending: Spending = "obrien-fleming"
) -> tuple[float, ...]:
    """For each look (numbers of seeds, ascending), the p of the t test up to which a difference is claimed.

    Raises `UserError` for looks that are not ascending numbers from 2.
    """
    if list(looks) != sorted(set(looks)) or not looks or looks[0] < 2:
        raise UserError(
            f"until.looks are {list(looks)}; write ascending numbers of seeds from 2, as [6, 10, 16]"
        )
    running = _simulated(looks)
    claimed, result = 0, []
    for i, n in enumerate(looks):
        # Claims so far and here together may be as many as the function says.
        wanted = int(spent(n / looks[-1], alpha=alpha, spending=spending) * _PATHS) - claimed
        level = float(np.partition(running[:, i], wanted - 1)[wanted - 1]) if wanted >= 1 else 0.0
        result.append(level)
        running = running[running[:, i] > level]
        claimed = _PATHS - len(running)
    return tuple(result)


def follow(
    differences: ArrayLike,
    looks: Sequence[int],
    *,
    alpha: float,
    spending: Spending = "obrien-fleming",
) -> list[Look]:
    """What is known after each look that there are seeds for. Intervals are Jennison and Turnbull's repeated ones.

    p is the smallest level at which the whole plan would have claimed a difference by then (Liu and Anderson 2008),
    rounded up by 2 % at most: p of several comparisons may go into Holm.
    """
    from scipy import special

    d = np.asarray(differences, dtype=np.float64)
    plan = tuple(looks)
    low, high, p = -math.inf, math.inf, 1.0
    result = []
    for i, (n, level) in enumerate(zip(plan, levels(plan, alpha=alpha, spending=spending), strict=True)):
        if n > d.size:
            break
        equal = np.ptp(d[:n]) == 0
        mean, error = float(d[:n].mean()), 0.0 if equal else float(d[:n].std(ddof=1)) / math.sqrt(n)
        if level > 0:
            half = -float(special.stdtrit(n - 1, level / 2)) * error
            low, high = max(low, mean - half), min(high, mean + half)
        raw = float(mean == 0) if equal else 2 * float(special.stdtr(n - 1, -abs(mean) / error))
        p = min(p, _smallest(plan, i, raw, spending))
        result.append(Look(n=n, mean=mean, low=low, high=high, p=p))
    return result


def _smallest(looks: tuple[int, ...], index: int, p: float, spending: Spending) -> float:
    """The smallest level of the whole plan at which this look claims a difference at this p; 1 where none does."""
    below, above = -1, math.ceil(math.log(1 / _LEAST, _STEP))
    while above - below > 1:
        middle = (below + above) // 2
        at = levels(looks, alpha=_LEAST * _STEP**middle, spending=spending)[index]
        below, above = (below, middle) if 0 < at >= p else (middle, above)
    return min(1.0, _LEAST * _STEP**above)


@functools.lru_cache(maxsize=4)
def _simulated(looks: tuple[int, ...]) -> NDArray[np.float64]:
    """The p of the t test at each look of studies without a difference, [studies, looks], from a fixed seed."""
    from scipy import stats

    draws = np.random.default_rng(20_08).standard_normal((_PATHS, looks[-1]))
    p = [
        2 * stats.t.sf(np.abs(x.mean(1)) / (x.std(1, ddof=1) / math.sqrt(n)), n - 1)
        for n, x in ((n, draws[:, :n]) for n in looks)
    ]
    return np.stack(p, axis=1)
