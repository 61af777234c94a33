"""Simulated studies with a known truth: coverage, family-wise error, and what the tests say."""

import gc
import math
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats

from entasis.study import statistics, verdict_text

SEEDS = 5


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """statsmodels' multipletests collects garbage on every call: 50 ms each with torch's objects about."""
    statistics.holm([0.5])  # imports statsmodels, so that its objects are frozen too
    gc.freeze()
    yield
    gc.unfreeze()


def simulate(rng: np.random.Generator, truth: list[float]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One study: a large seed effect that all arms share, and a small one of each run's own."""
    shared = rng.normal(0, 0.02, SEEDS)
    base = 1.5 + shared + rng.normal(0, 0.004, SEEDS)
    arms = {f"arm{k}": 1.5 + shared + d + rng.normal(0, 0.004, SEEDS) for k, d in enumerate(truth)}
    return base, arms


def test_intervals_cover_the_truth_95_percent_of_the_time() -> None:
    rng, truth = np.random.default_rng(1), [0.0, 0.003, -0.01]
    covered = []
    for _ in range(1500):
        base, arms = simulate(rng, truth)
        for d, (name, scores) in zip(truth, arms.items(), strict=True):
            _, low, high, _ = statistics.paired_interval(scores - base)
            covered.append(low <= d <= high)
            assert name
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_family_wise_error_is_at_most_5_percent() -> None:
    rng = np.random.default_rng(2)
    false = 0
    studies = 2000
    for _ in range(studies):
        base, arms = simulate(rng, [0.0] * 4)
        p = [statistics.paired_interval(scores - base)[3] for scores in arms.values()]
        false += min(statistics.holm(p)) < 0.05
    # The true rate is at most 5 %; a simulation of 2000 studies adds at most two standard errors to it.
    assert false / studies <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / studies)


PROTOCOLS, ARMS = 3, 4


@pytest.mark.parametrize(
    ("truth", "false"),
    [
        ([0.0] * ARMS, {"better", "worse"}),  # nothing differs
        ([0.01] * ARMS, {"same", "better"}),  # everything differs by just the margin
        ([0.0, 0.0, 0.01, 0.01], {}),  # half and half
    ],
)
@pytest.mark.parametrize("seeds", [3, 5])
def test_any_false_claim_over_three_protocols_is_at_most_5_percent(
    truth: list[float], false: set[str], seeds: int
) -> None:
    """Runs of one arm under three protocols share half of their noise, as they share their seeds."""
    rng, studies, wrong = np.random.default_rng(9), 400, 0
    for _ in range(studies):
        base = rng.normal(0, 0.002, seeds)
        own = rng.normal(0, 0.002, (ARMS, seeds))
        d = {
            (p, k): truth[k] + own[k] + rng.normal(0, 0.002, seeds) - base
            for p in range(PROTOCOLS)
            for k in range(ARMS)
        }
        found = statistics.adjust(statistics.compare(d, margin=0.01))
        wrong += any(
            verdict_text.judge(x) in (false or ({"better", "worse"} if truth[k] == 0 else {"same", "better"}))
            for (_, k), x in found.items()
        )
    assert wrong / studies <= 0.05


def test_a_lost_arm_leaves_the_family_as_it_was_planned() -> None:
    assert statistics.holm([0.01, math.nan, 0.04])[0] == pytest.approx(0.03)
    assert statistics.holm([0.01, 0.04], 3) == pytest.approx([0.03, 0.08])


def test_equivalence_is_claimed_falsely_at_most_5_percent_of_the_time() -> None:
    rng = np.random.default_rng(3)
    claimed = np.mean(
        [statistics.equivalence_p(0.01 + rng.normal(0, 0.004, SEEDS), 0.01) < 0.05 for _ in range(2000)]
    )
    assert claimed <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize(("seeds", "comparisons"), [(3, 1), (3, 4), (3, 14), (5, 3), (10, 6)])
def test_detectable_effect_is_found_with_power_80_percent(seeds: int, comparisons: int) -> None:
    sd = 0.004
    effect = statistics.detectable_effect(sd, seeds, comparisons)
    draws = np.random.default_rng(4).normal(effect, sd, (20_000, seeds))
    t = draws.mean(axis=1) / (draws.std(axis=1, ddof=1) / math.sqrt(seeds))
    found = np.abs(t) > stats.t.isf(0.025 / comparisons, seeds - 1)
    assert found.mean() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(("seeds", "factor"), [(3, 3.26), (5, 1.68), (8, 1.16), (10, 1.00)])
def test_detectable_effect_of_the_published_table(seeds: int, factor: float) -> None:
    assert statistics.detectable_effect(1.0, seeds) == pytest.approx(factor, abs=0.006)


def test_paired_interval_by_hand() -> None:
    mean, low, high, p = statistics.paired_interval([0.01, 0.02, 0.03])
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((0.02, 0.02 - half, 0.02 + half))
    assert p == pytest.approx(0.0742, abs=1e-4)


def test_one_seed_gives_no_interval_and_identical_runs_no_difference() -> None:
    mean, low, _, p = statistics.paired_interval([0.5])
    assert mean == 0.5 and math.isnan(low) and math.isnan(p)
    assert statistics.paired_interval([0.0, 0.0, 0.0]) == (0.0, 0.0, 0.0, 1.0)


def test_holm_says_nothing_of_unknown_values() -> None:
    assert math.isnan(statistics.holm([0.01, math.nan])[1])


def test_evaluation_error_is_that_of_a_mean_when_documents_are_equally_long() -> None:
    rng = np.random.default_rng(5)
    nll = rng.normal(0.0, 3.0, 400)
    size = np.full(400, 1000)
    expected = nll.std() / 20 / (1000 * math.log(2))
    assert statistics.evaluation_error(nll, size) == pytest.approx(expected, rel=0.06)


def test_total_interval_covers_when_seeds_and_documents_both_vary() -> None:
    rng = np.random.default_rng(6)
    covered = []
    for _ in range(600):
        evaluation = rng.normal(0, 0.003)  # one evaluation set: the same shift for every seed
        d = 0.01 + evaluation + rng.normal(0, 0.004, SEEDS)
        out = statistics.compare({"a": d}, margin=0.01, evaluation_errors={"a": 0.003})["a"]
        covered.append(out.total_low <= 0.01 <= out.total_high)
        assert out.total_low < out.low < out.high < out.total_high
    assert np.mean(covered) >= 0.95 - 0.015


def test_pooled_noise_is_the_residual_of_all_arms() -> None:
    rng = np.random.default_rng(8)
    p = []
    for _ in range(3000):
        arms = rng.normal(0, 0.01, (4, 3))
        noise = statistics.pooled_sd(list(arms))
        p.append(statistics.pooled_p(arms[0], noise, 8))
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.012)


def test_compare_reports_every_arm_with_adjusted_values() -> None:
    base, arms = simulate(np.random.default_rng(7), [0.0, -0.05])
    out = statistics.adjust(statistics.compare({name: x - base for name, x in arms.items()}, margin=0.01))
    assert out["arm1"].p_holm < 0.05 < out["arm0"].p_holm
    assert out["arm0"].p_holm >= out["arm0"].p
    assert out["arm0"].detectable == out["arm1"].detectable > 0
