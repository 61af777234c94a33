"""Level, intervals and p of planned looks, on studies drawn apart from those that the boundaries were read from."""

import math

import numpy as np
import pytest
from scipy import stats

from entasis.errors import UserError
from entasis.study.planned_looks import follow, levels, spent

LOOKS = (4, 6, 9, 12)


def p_values(x: np.ndarray) -> np.ndarray:
    """The p of the t test at each look, [studies, looks]."""
    found = []
    for n in LOOKS:
        t = np.abs(x[:, :n].mean(1)) / (x[:, :n].std(1, ddof=1) / math.sqrt(n))
        found.append(2 * stats.t.sf(t, n - 1))
    return np.stack(found, axis=1)


@pytest.mark.parametrize("spending", ["obrien-fleming", "pocock"])
@pytest.mark.parametrize("alpha", [0.05, 0.0125])
def test_planned_looks_spend_the_level_and_no_more(spending, alpha):
    found = levels(LOOKS, alpha=alpha, spending=spending)
    claims = p_values(np.random.default_rng(99).standard_normal((50_000, LOOKS[-1]))) <= np.array(found)
    rate = claims.any(axis=1).mean()
    assert rate == pytest.approx(alpha, abs=4 * math.sqrt(alpha / 50_000))
    by_then = [claims[:, : i + 1].any(axis=1).mean() for i in range(len(LOOKS))]
    wanted = [spent(n / 12, alpha=alpha, spending=spending) for n in LOOKS]
    assert by_then == pytest.approx(wanted, abs=4 * math.sqrt(alpha / 50_000))


def test_normal_theory_is_too_liberal():
    """The boundaries that normal theory gives for the same spending, put on t's p, exceed the level."""
    z = np.random.default_rng(5).standard_normal((200_000, LOOKS[-1])).cumsum(axis=1)
    standard = np.abs(np.stack([z[:, n - 1] / math.sqrt(n) for n in LOOKS], axis=1))
    running, bounds = np.ones(len(z), dtype=bool), []
    for i, n in enumerate(LOOKS):
        wanted = spent(n / 12, alpha=0.05, spending="pocock") * len(z) - (~running).sum()
        bounds.append(np.sort(standard[running, i])[-int(wanted)])
        running &= standard[:, i] < bounds[-1]
    x = np.random.default_rng(6).standard_normal((50_000, LOOKS[-1]))
    t = np.stack([x[:, :n].mean(1) / (x[:, :n].std(1, ddof=1) / math.sqrt(n)) for n in LOOKS], axis=1)
    assert (np.abs(t) > np.array(bounds)).any(axis=1).mean() > 0.075


def test_a_difference_is_claimed_where_p_is_at_most_alpha_and_where_the_interval_leaves_zero_out():
    for seed in range(0, 40, 3):
        d = np.random.default_rng(seed).normal(seed / 20, 1, 12)
        looks = follow(d, LOOKS, alpha=0.05)
        raw = p_values(d[None])[0]
        for i, look in enumerate(looks):
            claimed = bool((raw[: i + 1] <= np.array(levels(LOOKS, alpha=0.05)[: i + 1])).any())
            assert (not look.low <= 0 <= look.high) == claimed
            # p is rounded up by two in a hundred at most.
            assert look.p <= 0.05 * 1.02 if claimed else look.p > 0.05


def test_seeds_that_reach_no_look_tell_nothing():
    assert follow([0.1, 0.2, 0.3], LOOKS, alpha=0.05) == []
    assert [look.n for look in follow([0.1] * 3 + [0.3] * 4, LOOKS, alpha=0.05)] == [4, 6]


def test_looks_must_ascend():
    with pytest.raises(UserError, match="ascending"):
        levels((6, 4), alpha=0.05)
