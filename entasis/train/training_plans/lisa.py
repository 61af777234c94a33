"""Layers drawn anew every period."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from entasis import quantities
from entasis.configuration import Steps
from entasis.errors import UserError
from entasis.train.training_plans.plan import TRAINING_PLANS, ImportancePlan, Measured, Measurement, Phase


@TRAINING_PLANS.register("lisa")
class Lisa(ImportancePlan):
    """LISA (2403.17919): a few layers at a time, drawn anew every period; the odds may follow importance.

    Embedding, final norm and head learn throughout, as in the paper. Without `importance` all layers are as likely, as
    there. Moments of layers that rest are kept, where the paper drops them.
    """

    importance: list[float] | Measurement | None = None  # type: ignore[assignment]
    """Null: all layers alike."""
    layers: Annotated[int, Field(ge=1, le=1000)] = 2
    """How many learn at a time."""
    every: Steps = "5%"
    """Length of a period, in steps that train everything where `spend` is `flops`; after a measurement a share is of what is left."""

    def phases(self, n_layers: int, steps: int, seed: int, measured: Measured = ()) -> list[Phase]:
        if self.importance is None:
            for name in ("spread", "shuffle"):
                if not self.is_default(name):
                    raise UserError(
                        f"recipe: training_plan: {name} is of importance, and lisa was given none"
                    )
            return self.spread_over([1.0] * n_layers, steps, seed)
        return super().phases(n_layers, steps, seed, measured)

    def spread_over(self, counts: Sequence[float], steps: int, seed: int) -> list[Phase]:
        n_layers = len(counts)
        if self.layers > n_layers:
            raise UserError(
                f"recipe: training_plan: layers is {self.layers}; the model has {n_layers} layers"
            )
        period = max(1, quantities.steps(self.every, steps, "recipe: training_plan: every"))
        if self.every == 0:
            raise UserError("recipe: training_plan: every is 0; a period has a step at least")
        draw = random.Random(f"lisa/{seed}")
        lengths = [min(period, steps - start) for start in range(0, steps, period)]
        return [Phase(_draw(counts, self.layers, draw), length / steps) for length in lengths]


def _draw(odds: Sequence[float], n: int, draw: random.Random) -> tuple[int, ...]:
    """`n` different positions, one after another with odds proportional to `odds`."""
    left = dict(enumerate(odds))
    chosen = []
    for _ in range(n):
        (layer,) = draw.choices(list(left), weights=list(left.values()))
        chosen.append(layer)
        del left[layer]
    return tuple(sorted(chosen))
