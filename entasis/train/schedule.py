"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math

from entasis.train.recipe import Schedule, part


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """What the peak learning rate is multiplied by at `step` (from 0) of `steps`.

    Warm-up is linear and reaches 1 at its last step. `warmup-stable-decay` then stays at 1 and falls
    linearly over its last part; `cosine` falls over all that is left; both would reach `floor` one step
    after the last.
    """
    warmup = part(schedule.warmup, steps, "schedule.warmup")
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * progress)) / 2
    decay = part(schedule.decay, steps, "schedule.decay")
    left = steps - step
    if left >= decay:
        return 1.0
    return schedule.floor + (1 - schedule.floor) * left / decay
