"""Learning-rate schedules: pure functions of the step.

A new schedule is one registered function `find_factor(step, steps, *, decay, min_lr_factor) -> factor`; `step` and `steps` count from
the end of the warm-up, `decay` is `schedule.decay` in steps and `min_lr_factor` the factor where a falling schedule ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from entasis import quantities
from entasis.configuration import HERE, Settings, Steps
from entasis.errors import UserError
from entasis.registry import Registry, advise

SCHEDULES: Registry[Callable[..., float]] = Registry("recipe: schedule.name")


def _known(name: str) -> str:
    if name not in SCHEDULES:
        raise UserError(f"{HERE} is {name!r}; {advise(name, SCHEDULES)}")
    return name


class Schedule(Settings):
    renamed: ClassVar = {"floor": "min_lr_factor"}

    name: Annotated[str, AfterValidator(_known)] = "warmup-stable-decay"
    warmup: Steps = "2%"
    decay: Steps = "20%"
    """Last part of warmup-stable-decay, linear."""
    min_lr_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Final learning rate, as a share of the peak."""


@SCHEDULES.register("warmup-stable-decay")
def warmup_stable_decay(step: float, steps: float, *, decay: int, min_lr_factor: float) -> float:
    """The peak, then linear over the last `decay` steps; reaches `min_lr_factor` one step after the last."""
    left = steps - step
    return 1.0 if left >= decay else min_lr_factor + (1 - min_lr_factor) * left / decay


@SCHEDULES.register("cosine")
def cosine(step: float, steps: float, *, decay: int, min_lr_factor: float) -> float:
    """Half a cosine over all that is left after the warm-up; reaches `min_lr_factor` one step after the last."""
    return min_lr_factor + (1 - min_lr_factor) * (1 + math.cos(math.pi * (step / max(1, steps)))) / 2


@SCHEDULES.register("constant")
def constant(step: float, steps: float, *, decay: int, min_lr_factor: float) -> float:
    """The peak to the end."""
    return 1.0


def anneal(share: float, part: tuple[float, float], scale: float) -> float:
    """A stretch's `part` of a half cosine from `scale` to zero, where a `share` of the stretch is over."""
    begin, end = part
    return scale * (1 + math.cos(math.pi * min(1.0, begin + share * (end - begin)))) / 2


def factor(schedule: Schedule, step: float, steps: float) -> float:
    """What the peak learning rate is multiplied by at `step` (from 0) of `steps`, which are whole but for parts of schedules.

    Warm-up is linear and reaches 1 at its last step. Raises `UserError` for a schedule that is not registered.
    """
    find_factor = SCHEDULES.find(schedule.name)
    warmup = quantities.steps(schedule.warmup, steps, "recipe: schedule.warmup")
    if step < warmup:
        return (step + 1) / warmup
    decay = quantities.steps(schedule.decay, steps, "recipe: schedule.decay")
    return find_factor(step - warmup, steps - warmup, decay=decay, min_lr_factor=schedule.min_lr_factor)
