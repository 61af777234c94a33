"""Levels and power of looking after every seed, by simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize

from entasis.study.sequential import e_value, first_look, follow, half_width


def simulate(effect: float, studies: int, looks: int, alpha: float, g: float = 1.0) -> np.ndarray:
    """For each simulated study the first look with E ≥ 1/α, or looks + 1."""
    x = np.random.default_rng(7).normal(effect, 1, (studies, looks))
    n = np.arange(1, looks + 1)
    mean = x.cumsum(1) / n
    variance = ((x**2).cumsum(1) - n * mean**2) / np.maximum(n - 1, 1)
    first = np.full(studies, looks + 1)
    for k in range(looks, 1, -1):
        u = k * mean[:, k - 1] ** 2 / variance[:, k - 1] / (k - 1)
        prior = 1 + k * g
        e = prior**-0.5 * ((1 + u) / (1 + u / prior)) ** (k / 2)
        first[e >= 1 / alpha] = k
    return first


def test_the_formula_against_a_numerical_integral():
    """E is a ratio of marginal likelihoods: integrate δ ~ N(0, g) and 1/σ directly."""
    d, g = np.array([0.4, -0.1, 0.9, 0.3]), 2.0
    n = d.size

    def log_marginal(deltas, weights):
        s = np.exp(np.linspace(-4, 4, 2001))
        ll = -n * np.log(s)[None] - ((d[None, None] - deltas[:, None, None] * s[None, :, None]) ** 2).sum(
            -1
        ) / (2 * s[None] ** 2)
        return np.log((weights[:, None] * np.exp(ll)).sum())

    grid = np.linspace(-9, 9, 3001)
    prior = np.exp(-(grid**2) / (2 * g))
    found = log_marginal(grid, prior / prior.sum()) - log_marginal(np.zeros(1), np.ones(1))
    assert math.log(e_value(d, g=g)) == pytest.approx(found, abs=1e-4)


@pytest.mark.parametrize(("alpha", "g"), [(0.05, 1.0), (0.0125, 1.0), (0.05, 4.0)])
def test_false_claims_stay_below_the_level_in_forty_looks(alpha, g):
    first = simulate(0.0, 20_000, 40, alpha, g)
    assert (first <= 40).mean() < alpha * 0.7


@pytest.mark.parametrize(
    ("effect", "alpha", "needed", "mean"),
    [(1, 0.05, 18, 13.4), (2, 0.05, 8, 6.9), (3, 0.05, 6, 5.8), (1, 0.0125, 23, 17.6), (2, 0.0125, 10, 8.9)],
)
def test_the_price_in_seeds_is_the_known_one(effect, alpha, needed, mean):
    """Seeds for power 0.8, and their mean number, as an independent simulation gave them."""
    first = simulate(effect, 20_000, 40, alpha)
    assert np.quantile(first, 0.8, method="inverted_cdf") == needed
    assert first.mean() == pytest.approx(mean, abs=0.1)


def test_no_claim_before_five_seeds():
    assert first_look(alpha=0.05) == 5 and first_look(alpha=0.0125) == 6
    best = [e_value([1.0] * n) for n in range(2, 7)]  # no differences give more evidence than equal ones
    assert best[2] < 1 / 0.05 <= best[3] and best[3] < 1 / 0.0125 <= best[4]


def test_the_interval_is_what_e_does_not_exclude():
    d = np.random.default_rng(1).normal(0.5, 1, 9)
    edge = optimize.brentq(lambda m: e_value(d - m) - 1 / 0.05, d.mean(), d.mean() + 50)
    assert edge - d.mean() == pytest.approx(half_width(9, alpha=0.05) * d.std(ddof=1), rel=1e-9)


def test_intervals_only_shrink_and_p_only_falls():
    looks = follow(np.random.default_rng(2).normal(0.8, 1, 30), alpha=0.05)
    for before, after in itertools.pairwise(looks):
        assert after.low >= before.low and after.high <= before.high and after.p <= before.p
    differs = next(look.n for look in looks if look.low > 0)
    assert looks[differs - 1].p <= 0.05 < looks[differs - 2].p


def test_equal_differences_are_no_proof_from_few_seeds():
    assert follow([0.1] * 4, alpha=0.05)[-1].p > 0.05
    assert follow([0.0] * 30, alpha=0.05)[-1].p == 1.0
