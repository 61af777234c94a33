import numpy as np
import pytest

from entasis.anatomy import intervals
from entasis.anatomy.intervals import change_by_chance, correlate_ranks, find_harmful, loss_change


@pytest.fixture(autouse=True)
def uncollected(monkeypatch: pytest.MonkeyPatch) -> None:
    """statsmodels collects garbage at every call, which takes longer than all the rest."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def test_the_value_is_the_mean_per_token() -> None:
    clean = np.array([10.0, 20.0, 5.0, 5.0])
    changed = np.array([[11.0, 23.0, 5.0, 5.0], clean])
    found = loss_change(changed, clean, np.array([5, 15, 10, 10]))
    assert found.value.tolist() == [4 / 40, 0.0]
    # A change of nothing is certain to be nothing.
    assert (found.low[1], found.high[1], found.p[1]) == (0.0, 0.0, 1.0)


def test_intervals_hold_the_truth_with_few_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "DRAWS", 999)
    random, held = np.random.default_rng(0), 0
    for _ in range(150):
        tokens = random.integers(50, 200, 12)
        gain = 0.1 * tokens + random.normal(0, 4, 12) * np.sqrt(tokens)
        found = loss_change(gain[None], np.zeros(12), tokens)
        held += found.low[0] <= 0.1 <= found.high[0]
    assert 0.90 <= held / 150 <= 0.99


def test_no_effect_is_rarely_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "DRAWS", 1999)
    random = np.random.default_rng(1)
    called = 0
    for _ in range(60):
        tokens = np.full(20, 100)
        found = loss_change(random.normal(0, 10, (10, 20)), np.zeros(20), tokens)
        called += bool((found.p < 0.05).any())
    assert called <= 8  # of ten layers at once, in 5 % of 60: three


def test_a_layer_without_a_value_is_left_out_of_the_family() -> None:
    changed = np.array([[1.0, 1.1, 0.9, 1.0], [np.nan] * 4])
    found = loss_change(changed, np.zeros(4), np.ones(4))
    assert found.value[0] == 1.0 and np.isnan(found.value[1]) and np.isnan(found.p[1])


@pytest.mark.parametrize("documents", [1, 2, 3, 4])
def test_below_four_documents_there_is_no_interval(documents: int) -> None:
    changed = np.arange(1.0, 1 + documents)
    found = loss_change(changed[None], np.zeros(documents), np.full(documents, 10))
    assert found.value[0] == pytest.approx(changed.mean() / 10)
    numbers = np.array([found.low[0], found.high[0], found.p[0]])
    assert np.isfinite(numbers).all() if documents == 4 else np.isnan(numbers).all()


def test_documents_without_a_token_make_no_interval() -> None:
    found = loss_change(np.array([[1.0, 2.0, 0.0, 0.0]]), np.zeros(4), np.array([10, 10, 0, 0]))
    assert np.isnan([found.low[0], found.high[0], found.p[0]]).all()


def test_harm_must_be_certain_and_beyond_chance() -> None:
    by_chance = change_by_chance(np.array([0.01, -0.01, 0.01, -0.01, np.nan]))
    assert 0.02 < by_chance < 0.06
    value, p = np.array([-0.1, -0.1, -0.001, 0.1]), np.array([0.01, 0.2, 0.01, 0.01])
    assert find_harmful(value, p, by_chance).tolist() == [True, False, False, False]


def test_chance_bounds_all_layers_at_once() -> None:
    random = np.random.default_rng(2)
    beyond = sum(
        bool((random.normal(size=12) < -change_by_chance(random.normal(size=12))).any()) for _ in range(1000)
    )
    assert beyond / 1000 <= 0.05


def test_rank_correlation() -> None:
    a = np.arange(12.0)
    assert correlate_ranks(a, np.exp(a))[0] == pytest.approx(1)
    assert correlate_ranks(a, -a)[0] == pytest.approx(-1)
    rho, low, high = correlate_ranks(a, np.random.default_rng(0).normal(size=12))
    assert low < rho < high and high - low > 0.5
    assert np.isnan(correlate_ranks(a, np.ones(12))[0])
