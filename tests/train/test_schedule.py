import math

import pytest

from entasis.train.recipe import Schedule
from entasis.train.schedule import factor


def curve(schedule: Schedule, steps: int) -> list[float]:
    return [factor(schedule, step, steps) for step in range(steps)]


def test_warmup_stable_decay_rises_stays_and_falls_linearly():
    values = curve(Schedule("warmup-stable-decay", warmup="10%", decay="20%"), 20)
    assert values[:2] == [0.5, 1.0]
    assert values[2:17] == [1.0] * 15
    assert values[16:] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_floor_is_where_the_decay_ends():
    steps = 1000
    for name in ("warmup-stable-decay", "cosine"):
        last = factor(Schedule(name, floor=0.1), steps - 1, steps)  # type: ignore[arg-type]
        assert 0.1 < last < 0.11


def test_cosine_passes_its_middle_halfway():
    schedule = Schedule("cosine", warmup=0)
    assert factor(schedule, 50, 100) == pytest.approx(0.5)
    assert factor(schedule, 25, 100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_constant_stays_after_warmup():
    assert curve(Schedule("constant", warmup=4), 8) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_warmup_counts_steps_or_a_share():
    assert curve(Schedule(warmup=10), 500) == curve(Schedule(warmup="2%"), 500)
