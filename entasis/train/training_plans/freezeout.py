"""Layers frozen from the bottom at set times."""

from __future__ import annotations

from pydantic import Field

from entasis.configuration import Share
from entasis.train.training_plans.plan import TRAINING_PLANS, Measured, Phase, TrainingPlan


@TRAINING_PLANS.register("freezeout")
class FreezeOut(TrainingPlan):
    """FreezeOut (1706.04983): layers stop learning from the bottom up, layer i of L after the share
    (t0 + (1 - t0) · i / L)³ of the steps (without the cube where `cubed` is false); what is above the layers learns to the
    end, the embedding as long as layer 0.

    The paper lets each layer's rate fall to zero by a cosine of its own until it is frozen, and scales the rates so that
    their integrals are equal; here all learn at the run's rate.
    """

    always: list[str] = Field(default_factory=lambda: ["final_norm", "head"])
    t0: Share = 0.5
    cubed: bool = True

    def phases(self, n_layers: int, steps: int, seed: int, measured: Measured = ()) -> list[Phase]:
        ends = [(self.t0 + (1 - self.t0) * i / n_layers) ** (3 if self.cubed else 1) for i in range(n_layers)]
        result, start = [], 0.0
        for i, end in enumerate(ends):
            if end > start:
                layers = tuple(range(i, n_layers))
                result.append(Phase(layers, end - start, everything=i == 0))
                start = end
        return [*result, Phase((), 1 - start)]
