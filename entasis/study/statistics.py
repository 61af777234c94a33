"""The statistics of a study: paired differences, Holm, equivalence, evaluation error, detectable effects.

All scores are lower-is-better (bits per byte). Arrays carry one value per seed, in the same order of seeds
for every arm, because seed s gives every arm the same data order and the same initial values: only the
differences within a seed are compared.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
POWER = 0.8

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One arm minus the baseline, in the unit of the score; negative is better.

    Those p whose names end in `_holm` are adjusted over all comparisons of the study, the others raw. Those with
    `pooled` take the noise of all arms instead of this arm's own. Values that a single pair of seeds cannot give are
    NaN.
    """

    n: int
    mean: float
    low: float
    high: float
    sd: float
    """Standard deviation of the differences over seeds."""
    evaluation_error: float
    """Standard error that comes from the choice of evaluation documents (paired bootstrap)."""
    total_low: float
    total_high: float
    """The interval with both variances: seeds and evaluation documents."""
    p: float
    p_pooled: float = math.nan
    p_equivalent: float
    p_equivalent_pooled: float = math.nan
    p_holm: float = math.nan
    p_pooled_holm: float = math.nan
    p_equivalent_holm: float = math.nan
    p_equivalent_pooled_holm: float = math.nan
    noise: float
    """The pooled standard deviation of a paired difference."""
    detectable: float = math.nan
    """The smallest true difference the study would show with power 0.8, after Holm's first step; where seeds are added
    until one knows, half the width of the simultaneous sequence."""
    length_error: float = 0.0
    """At equal time: what the error of the measured speed is worth, half a 95 % interval; NaN if unknown."""
    margin: float = math.inf
    """With a length error: what it is compared with before sameness is claimed."""
    method: Literal["fixed", "anytime", "looks"] = "fixed"
    """Whether intervals and p are of a number of seeds fixed beforehand, or hold whenever one stops (`stopping`)."""
    together_low: float = math.nan
    """Of the simultaneous sequence over all comparisons."""
    together_high: float = math.nan
    inside: bool = False
    """Whether the simultaneous sequence lies within ±margin."""


def paired_interval(
    differences: ArrayLike, confidence: float = CONFIDENCE
) -> tuple[float, float, float, float]:
    """Mean, low, high and two-sided p of paired differences: `mean ± t·sd/√n`. One pair gives NaN bounds.

    Identical differences (sd 0) give an interval of no width and p 0, or p 1 where they are all zero.
    """
    from scipy import stats

    d = np.asarray(differences, dtype=np.float64)
    if d.size < 2:
        return float(d.mean()), math.nan, math.nan, math.nan
    if np.ptp(d) == 0:
        return float(d[0]), float(d[0]), float(d[0]), float(d[0] == 0)
    mean, error = float(d.mean()), float(d.std(ddof=1)) / math.sqrt(d.size)
    low, high = stats.t.interval(confidence, d.size - 1, loc=mean, scale=error)
    return mean, float(low), float(high), 2 * float(stats.t.sf(abs(mean) / error, d.size - 1))


def one_sided_p(differences: ArrayLike) -> float:
    """p of the t test that the mean is not above zero."""
    mean, _, _, p = paired_interval(differences)
    return p / 2 if mean > 0 else 1 - p / 2


def equivalence_p(differences: ArrayLike, margin: float) -> float:
    """p of the two one-sided tests that the mean difference lies within ±margin (statsmodels' TOST)."""
    from statsmodels.stats.weightstats import DescrStatsW

    d = np.asarray(differences, dtype=np.float64)
    if d.size < 2:
        return math.nan
    if np.ptp(d) == 0:
        return float(abs(d[0]) >= margin)
    return float(DescrStatsW(d).ttost_mean(-margin, margin)[0])


def holm(p: Sequence[float], comparisons: int | None = None) -> list[float]:
    """Holm's adjusted p values in a family of so many `comparisons`, by default all of `p`; NaNs stay NaN.

    Comparisons that were planned and have no p (an arm without finished runs, a NaN) count as 1: which ones are lost
    must not decide how strictly the others are judged.
    """
    from statsmodels.stats.multitest import multipletests

    values = np.asarray(p, dtype=np.float64)
    known = ~np.isnan(values)
    result = np.full(values.shape, np.nan)
    if known.any():
        lost = max(comparisons or 0, len(values)) - int(known.sum())
        adjusted = multipletests(np.append(values[known], np.ones(lost)), method="holm")[1]
        result[known] = adjusted[: int(known.sum())]
    return [float(x) for x in result]


def detectable_effect(sd: float, n: int, comparisons: int = 1) -> float:
    """Smallest true mean difference that `n` pairs show with power 0.8, in the unit of `sd`.

    Two-sided 5 %, split over the comparisons as Holm's first step does, so that the number belongs to the
    test that is made: with one comparison 3.26 sd for 3 seeds, 1.68 sd for 5.
    """
    return math.nan if n < 2 or math.isnan(sd) else _detectable_in_sd(n, comparisons) * sd


@functools.cache
def _detectable_in_sd(n: int, comparisons: int) -> float:
    from scipy import optimize, stats

    # Not statsmodels' TTestPower.solve_power: for few seeds and small levels it converges to wrong values without
    # a word (n 3, level 0.0125: 5.00 or 4.11 for the 6.55 that simulation and the noncentral t give). The tail on
    # the wrong side is below 1e-6 at power 0.8 and left out.
    critical = float(stats.t.isf(ALPHA / comparisons / 2, n - 1))
    effect = optimize.brentq(
        lambda e: stats.nct.sf(critical, n - 1, e * math.sqrt(n)) - POWER, 1e-3, 10 * critical / math.sqrt(n)
    )
    return float(effect)


def evaluation_error(
    nll_difference_D: ArrayLike, bytes_D: ArrayLike, *, resamples: int = 2000, seed: int = 0
) -> float:
    """Standard error in bits per byte of a difference that comes from which documents were evaluated.

    `nll_difference_D` [documents] is arm minus baseline in nats, averaged over seeds; documents are drawn
    with their bytes, so the ratio Σ nll / (Σ bytes · ln 2) is bootstrapped, paired by document. Fewer than two
    documents give NaN.
    """
    from scipy import stats

    nll, size = np.asarray(nll_difference_D, dtype=np.float64), np.asarray(bytes_D, dtype=np.float64)
    if nll.size < 2:
        return math.nan

    def ratio(a: NDArray[np.float64], b: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return a.sum(axis) / (b.sum(axis) * math.log(2))

    result = stats.bootstrap(
        (nll, size),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // nll.size),  # bounds the memory: at most 2 M drawn indices at a time
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.standard_error)


def compare(
    differences: Mapping[str, ArrayLike],
    *,
    margin: float,
    evaluation_errors: Mapping[str, float] | None = None,
    noise_from: Iterable[str] | None = None,
) -> dict[str, Difference]:
    """Measures every arm's paired differences to the baseline, [pairs of seeds] each; arms may have lost some.

    The noise is pooled over the arms `noise_from` (by default all), as three seeds tell little about one arm's own
    sd. What depends on how many comparisons there are is left NaN; `adjust` fills it in.
    """
    d = {name: np.asarray(x, dtype=np.float64) for name, x in differences.items()}
    measured = [d[name] for name in (d if noise_from is None else noise_from) if name in d]
    pooled, degrees = pooled_sd(measured), sum(max(0, x.size - 1) for x in measured)
    result = {}
    for name, x in d.items():
        mean, low, high, p = paired_interval(x)
        sd = float(x.std(ddof=1)) if x.size > 1 else math.nan
        error = (evaluation_errors or {}).get(name, math.nan)
        half = _total_half_width(sd, x.size, error)
        result[name] = Difference(
            n=int(x.size),
            mean=mean,
            low=low,
            high=high,
            sd=sd,
            evaluation_error=error,
            total_low=mean - half,
            total_high=mean + half,
            p=p,
            p_pooled=pooled_p(x, pooled, degrees),
            p_equivalent=equivalence_p(x, margin),
            p_equivalent_pooled=pooled_equivalence_p(x, margin, pooled, degrees),
            noise=pooled,
        )
    return result


def adjust(found: Mapping[K, Difference], comparisons: int | None = None) -> dict[K, Difference]:
    """Holm over everything that was compared, one protocol's arms beside another's, each kind of p by itself.

    `comparisons` is how many the study planned: those that are not here count too.
    """
    family = max(comparisons or 0, len(found))
    adjusted = {
        name: dict(zip(found, holm([getattr(d, name) for d in found.values()], family), strict=True))
        for name in ("p", "p_pooled", "p_equivalent", "p_equivalent_pooled")
    }
    return {
        key: dataclasses.replace(
            d,
            p_holm=adjusted["p"][key],
            p_pooled_holm=adjusted["p_pooled"][key],
            p_equivalent_holm=adjusted["p_equivalent"][key],
            p_equivalent_pooled_holm=adjusted["p_equivalent_pooled"][key],
            detectable=detectable_effect(d.noise, d.n, family),
        )
        for key, d in found.items()
    }


def pooled_sd(differences: Sequence[NDArray[np.float64]]) -> float:
    """Root of the mean variance over arms, weighted by degrees of freedom; NaN without two seeds anywhere."""
    known = [x for x in differences if x.size > 1]
    if not known:
        return math.nan
    degrees = sum(x.size - 1 for x in known)
    return math.sqrt(sum(float(x.var(ddof=1)) * (x.size - 1) for x in known) / degrees)


def pooled_p(differences: ArrayLike, noise: float, degrees: int) -> float:
    """Two-sided p of a mean difference, its noise known from `degrees` degrees of freedom over all arms.

    Three seeds can agree by luck, and an arm's own sd then says too little: this is the second opinion.
    """
    from scipy import stats

    d = np.asarray(differences, dtype=np.float64)
    if d.size < 2 or math.isnan(noise):
        return math.nan
    if noise == 0:
        return float(d.mean() == 0)
    return 2 * float(stats.t.sf(abs(d.mean()) / (noise / math.sqrt(d.size)), degrees))


def pooled_equivalence_p(differences: ArrayLike, margin: float, noise: float, degrees: int) -> float:
    """As `equivalence_p`, the noise known from `degrees` degrees of freedom over all arms."""
    from scipy import stats

    d = np.asarray(differences, dtype=np.float64)
    if d.size < 2 or math.isnan(noise):
        return math.nan
    inside = margin - abs(float(d.mean()))
    if noise == 0:
        return float(inside <= 0)
    return float(stats.t.sf(inside / (noise / math.sqrt(d.size)), degrees))


def _total_half_width(sd: float, n: int, evaluation: float) -> float:
    """Half width for `Var = Var_seed/n + Var_eval`, with the t of n - 1 degrees of freedom.

    Welch–Satterthwaite would give more degrees, and with three seeds often a shorter interval than that of the
    seeds alone; an added source of error must not do that.
    """
    from scipy import stats

    variance = sd**2 / n + evaluation**2
    if math.isnan(variance) or n < 2:
        return math.nan
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * math.sqrt(variance)
