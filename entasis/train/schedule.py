"""Learning-rate schedules: pure functions of the step.

A new schedule is one registered function `rule(step, steps, *, decay, floor) -> factor`; `step` and `steps` count from
the end of the warm-up, `decay` is `schedule.decay` in steps and `floor` the factor where a falling schedule ends.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from entasis.errors import UserError
from entasis.registry import Registry, advise

Share = int | str
"""A number of steps, or a share of all steps: 100, "2%"."""
Rule = Callable[..., float]
SCHEDULES: Registry[Rule] = Registry("recipe: schedule.name")


@dataclass
class Schedule:
    name: str = "warmup-stable-decay"
    warmup: Share = "2%"
    decay: Share = "20%"
    """Last part of warmup-stable-decay, linear."""
    floor: float = 0.0
    """Final learning rate, as a share of the peak."""

    def check(self, where: str = "schedule") -> None:
        """Raises `UserError` for a name that is not registered."""
        if self.name not in SCHEDULES:
            raise UserError(f"recipe: {where}.name is {self.name!r}; {advise(self.name, SCHEDULES)}")


@SCHEDULES.register("warmup-stable-decay")
def warmup_stable_decay(step: int, steps: int, *, decay: int, floor: float) -> float:
    """The peak, then linear over the last `decay` steps; reaches `floor` one step after the last."""
    left = steps - step
    return 1.0 if left >= decay else floor + (1 - floor) * left / decay


@SCHEDULES.register("cosine")
def cosine(step: int, steps: int, *, decay: int, floor: float) -> float:
    """Half a cosine over all that is left after the warm-up; reaches `floor` one step after the last."""
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step / max(1, steps)))) / 2


@SCHEDULES.register("constant")
def constant(step: int, steps: int, *, decay: int, floor: float) -> float:
    """The peak to the end."""
    return 1.0


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """What the peak learning rate is multiplied by at `step` (from 0) of `steps`.

    Warm-up is linear and reaches 1 at its last step. Raises `UserError` for a schedule that is not registered.
    """
    rule = SCHEDULES.find(schedule.name)
    warmup = part(schedule.warmup, steps, "schedule.warmup")
    if step < warmup:
        return (step + 1) / warmup
    decay = part(schedule.decay, steps, "schedule.decay")
    return rule(step - warmup, steps - warmup, decay=decay, floor=schedule.floor)


def part(value: Share, total: int, where: str) -> int:
    """Steps from a number of steps or a share (`"2%"`) of `total`. Raises `UserError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", str(value).strip())
    if match and match[2] and float(match[1]) <= 100:
        return round(float(match[1]) / 100 * total)
    if match and not match[2] and "." not in match[1]:
        return int(match[1])
    raise UserError(f"recipe: {where} is {value!r}; write a number of steps (100) or a share of them (2%)")
