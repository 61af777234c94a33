"""Layers frozen from the bottom where their gradients have settled."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from entasis.configuration import Count
from entasis.train.training_plans.plan import TRAINING_PLANS, Measured, Measurement, Phase, TrainingPlan


@TRAINING_PLANS.register("autofreeze")
class AutoFreeze(TrainingPlan):
    """AutoFreeze (2102.01386): layers are frozen from the bottom up once their gradients have settled.

    A layer's change is |n - n'| / n of its gradient's norms n, n' at two looks. Layers are frozen from the bottom, one after
    another, while their change is below the given percentile of those that still learn; the last one never is.

    Our reading: a look takes the norm of the mean gradient on the text that comes next, where the authors' code takes that
    of the gradients summed up since the last look; what is above the layers learns to the end, the embedding as long as
    layer 0.
    """

    always: list[str] = Field(default_factory=lambda: ["final_norm", "head"])
    looks: Annotated[int, Field(ge=2, le=1000)] = 9
    """How many, at equal distances; after the last there is one more stretch."""
    percentile: Annotated[float, Field(ge=0, le=100)] = 50.0
    tokens: Count = 16_384
    """How much training text is read at each look."""

    @property
    def measurement(self) -> Measurement:
        return Measurement(measure="gradient", tokens=self.tokens)

    @property
    def measurements(self) -> int:
        return self.looks

    def phases(self, n_layers: int, steps: int, seed: int, measured: Measured = ()) -> list[Phase]:
        share, frozen = 1 / (self.looks + 1), 0
        result = [Phase((), share, everything=True)]
        for look in range(len(measured)):
            if look:
                before, now = (np.asarray(measured[i][frozen:]) for i in (look - 1, look))
                changes = abs(before - now) / np.maximum(before, np.finfo(float).tiny)
                still = changes < np.percentile(changes, self.percentile)
                frozen += int(np.argmin([*still[:-1], False]))
            result.append(Phase(tuple(range(frozen, n_layers)), share, everything=frozen == 0))
        return result
