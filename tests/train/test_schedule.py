import math
from pathlib import Path

import pytest

from entasis.errors import UserError
from entasis.registry import Registry
from entasis.train import schedule as schedules
from entasis.train.metrics import records
from entasis.train.run import train
from entasis.train.schedule import Schedule, factor


def curve(schedule: Schedule, steps: int) -> list[float]:
    return [factor(schedule, step, steps) for step in range(steps)]


def test_warmup_stable_decay_rises_stays_and_falls_linearly():
    values = curve(Schedule(name="warmup-stable-decay", warmup="10%", decay="20%"), 20)
    assert values[:2] == [0.5, 1.0]
    assert values[2:17] == [1.0] * 15
    assert values[16:] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_floor_is_where_the_decay_ends():
    steps = 1000
    for name in ("warmup-stable-decay", "cosine"):
        last = factor(Schedule(name=name, min_lr_factor=0.1), steps - 1, steps)  # type: ignore[arg-type]
        assert 0.1 < last < 0.11


def test_cosine_passes_its_middle_halfway():
    schedule = Schedule(name="cosine", warmup=0)
    assert factor(schedule, 50, 100) == pytest.approx(0.5)
    assert factor(schedule, 25, 100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_constant_stays_after_warmup():
    assert curve(Schedule(name="constant", warmup=4), 8) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_warmup_counts_steps_or_a_share():
    assert curve(Schedule(warmup=10), 500) == curve(Schedule(warmup="2%"), 500)


def test_a_name_that_is_not_registered_is_refused_wherever_it_stands(recipe):
    with pytest.raises(UserError, match=r"schedule.name is 'linear'; did you mean cosine\?"):
        recipe(schedule={"name": "linear"})
    with pytest.raises(UserError, match=r"stages\[1\].schedule.name is 'linear'"):
        recipe(tokens=None, stages=[{"tokens": 512}, {"tokens": 512, "schedule": {"name": "linear"}}])
    with pytest.raises(UserError, match=r"schedule.name 'linear' is not known"):
        factor(Schedule.model_construct(name="linear", warmup=0), 0, 10)


def test_a_registered_schedule_is_known_to_recipes_and_trains(recipe, tmp_path, monkeypatch):
    known = Registry("recipe: schedule.name")
    known.update(schedules.SCHEDULES)
    monkeypatch.setattr(schedules, "SCHEDULES", known)

    @known.register("halving")
    def halving(step: int, steps: int, *, decay: int, min_lr_factor: float) -> float:
        return max(min_lr_factor, 0.5**step)

    wanted = {"name": "halving", "warmup": 1, "min_lr_factor": 0.1}
    train(recipe(tokens=512 * 6, schedule=wanted), tmp_path / "run")
    rates = [record["lr"] for record in records(tmp_path / "run") if "lr" in record]
    assert [rate / rates[0] for rate in rates] == pytest.approx([1, 1, 0.5, 0.25, 0.125, 0.1])


def test_every_registered_schedule_stands_in_the_docs():
    text = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| `schedule.name`"))
    assert [name for name in schedules.SCHEDULES if name not in row] == []
