"""Studies of several arms that end when they know: what they claim, what they ask for, and how often they are wrong."""

import gc
import math
from collections.abc import Iterator

import numpy as np
import pytest

from entasis.errors import UserError
from entasis.study import statistics
from entasis.study.stopping import Until, needed, schedule, sees, standings

MARGIN = 0.01


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """statsmodels' multipletests collects garbage on every call: 50 ms each with torch's objects about."""
    statistics.holm([0.5])
    gc.freeze()
    yield
    gc.unfreeze()


def draw(truth: dict[str, float], sd: float, seeds: int, seed: int) -> dict[str, np.ndarray]:
    """Differences to one baseline, whose noise all arms share."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0, sd / math.sqrt(2), seeds)
    return {name: mean + rng.normal(0, sd / math.sqrt(2), seeds) - base for name, mean in truth.items()}


def run(d: dict[str, np.ndarray], until: Until, lost: dict[str, int] | None = None) -> dict[str, int]:
    """The seeds that each comparison gets, asking anew after every round. `lost`: whose seed of this number fails."""
    lost = lost or {}
    counts = dict.fromkeys(d, 0)
    while True:
        have = {name: x[: min(counts[name], lost.get(name, 99))] for name, x in d.items()}
        ended = {name for name in lost if counts[name] > lost[name]}
        asked = needed(have, until, comparisons=len(d), margin=MARGIN, ended=ended)
        if all(counts[name] >= asked[name] for name in d):
            return counts
        counts = {name: max(counts[name], asked[name]) for name in d}


def test_answered_arms_get_no_further_seeds():
    d = draw({"far": 0.05, "near": 0.0, "between": 0.006}, 0.004, 30, 3)
    counts = run(d, Until(seeds=30, detectable=0.003))
    assert 6 <= counts["far"] <= 8 < counts["near"] < 30
    found = standings(
        {k: x[: counts[k]] for k, x in d.items()},
        Until(seeds=30, detectable=0.003),
        comparisons=3,
        margin=MARGIN,
    )
    assert (found["far"].answer, found["near"].answer, found["between"].answer) == (
        "differs",
        "same",
        "differs",
    )


def test_without_a_detectable_difference_all_get_all_seeds():
    assert run(draw({"a": 0.5, "b": 0.0}, 0.004, 8, 1), Until(seeds=8)) == {"a": 8, "b": 8}


def test_none_gets_more_than_the_most_seeds():
    assert run(draw({"a": 0.0}, 1.0, 12, 1), Until(seeds=12, detectable=0.001)) == {"a": 12}


@pytest.mark.parametrize("method", ["anytime", "looks"])
def test_stopping_anywhere_and_going_on_asks_for_the_same_seeds(method):
    """Killed in the middle of a round: some comparisons have their next seed and some have not."""
    until = Until(seeds=16, detectable=0.004, method=method)
    for seed in range(6):
        d = draw({"a": 0.02, "b": 0.0, "c": 0.005}, 0.006, 16, seed)
        whole = run(d, until)
        rng = np.random.default_rng(seed)
        counts = dict.fromkeys(d, 0)
        while True:
            asked = needed({k: x[: counts[k]] for k, x in d.items()}, until, comparisons=3, margin=MARGIN)
            if all(counts[k] >= asked[k] for k in d):
                break
            for k in d:  # each gets some of what it lacks
                counts[k] += int(rng.integers(0, max(0, asked[k] - counts[k]) + 1))
        assert counts == whole


def test_a_seed_that_cannot_be_had_ends_its_comparison_and_no_other():
    d = draw({"a": 0.05, "broken": 0.05}, 0.004, 20, 2)
    until = Until(seeds=20, detectable=0.001)
    counts = run(d, until, lost={"broken": 3})
    assert counts["a"] >= 6
    found = standings(
        {"a": d["a"][: counts["a"]], "broken": d["broken"][:3]}, until, comparisons=2, margin=MARGIN
    )
    assert found["a"].answer == "differs" and found["broken"].answer is None
    assert found["broken"].alone[-1].n == 3


def test_the_family_is_what_was_planned():
    d = draw({"a": 0.007}, 0.004, 9, 4)
    alone = standings(d, Until(seeds=9), comparisons=1, margin=MARGIN)["a"]
    among = standings(d, Until(seeds=9), comparisons=8, margin=MARGIN)["a"]
    assert among.p_holm == pytest.approx(8 * alone.p_holm)
    assert among.together[-1].half_width > alone.together[-1].half_width
    assert among.alone[-1] == alone.alone[-1]


def test_too_few_seeds_to_say_anything_are_refused():
    with pytest.raises(
        UserError, match=r"until.seeds is 5; with g 1 and 4 comparisons nothing .* before 6 seeds"
    ):
        schedule(Until(seeds=5, detectable=0.01), 4)


@pytest.mark.parametrize(
    ("until", "looks"),
    [
        (Until(seeds=8), [5, 6, 7, 8]),
        (Until(seeds=20, method="looks"), [5, 10, 15, 20]),
        (Until(seeds=5, method="looks"), [3, 4, 5]),
        (Until(seeds=12, looks=[6, 9]), [6, 9, 12]),
    ],
)
def test_when_one_looks(until, looks):
    assert schedule(until, 1) == looks


def test_a_control_is_seen_when_it_is_worse_and_never_when_it_is_better():
    until = Until(seeds=9)
    d = draw({"c": 0.03}, 0.004, 9, 1)["c"]
    assert sees(standings({"c": d}, until, comparisons=1, margin=MARGIN)["c"].alone) in (5, 6)
    assert sees(standings({"c": -d}, until, comparisons=1, margin=MARGIN)["c"].alone) is None


@pytest.mark.parametrize("method", ["anytime", "looks"])
@pytest.mark.parametrize("truth", [0.0, MARGIN])
def test_any_false_claim_of_a_study_is_at_most_5_percent(method, truth):
    """Four arms, two protocols that share half of their noise, ties (scores in steps), and arms that lose seeds."""
    until = Until(seeds=16, detectable=0.004, method=method)
    studies, wrong = 300, 0
    for i in range(studies):
        rng = np.random.default_rng(1000 + i)
        base, own = rng.normal(0, 0.004, 16), rng.normal(0, 0.004, (4, 16))
        d = {}
        for protocol in range(2):
            for arm in range(4):
                x = truth + own[arm] + rng.normal(0, 0.003, 16) - base
                d[f"{protocol}{arm}"] = np.round(x, 3) if arm == 1 else x
        lost = {"02": int(rng.integers(16)), "13": int(rng.integers(16))}
        have = {k: x[: lost.get(k, 16)] for k, x in d.items()}
        counts = needed(have, until, comparisons=len(d), margin=MARGIN, ended=set(lost))
        have = {k: x[: counts[k]] for k, x in have.items()}
        found = standings(have, until, comparisons=len(d), margin=MARGIN).values()
        wrong += any(s.answer == ("differs" if truth == 0 else "same") for s in found)
    assert wrong / studies <= 0.05
