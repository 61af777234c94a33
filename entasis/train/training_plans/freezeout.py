"""Layers frozen from the bottom at set times."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from entasis.configuration import Share
from entasis.train.training_plans.plan import TRAINING_PLANS, Anneal, Measured, Phase, TrainingPlan


@TRAINING_PLANS.register("freezeout")
class FreezeOut(TrainingPlan):
    """FreezeOut (1706.04983): layers stop learning from the bottom up, each at a time set beforehand.

    Layer i of L stops after the share t_i = (t0 + (1 - t0) · i / L)³ of the steps (without the cube where `cubed` is false).

    Our reading: what is above the layers learns to the end, the embedding as long as layer 0; by default all layers keep the
    run's rate until they stop.
    """

    always: list[str] = Field(default_factory=lambda: ["final_norm", "head"])
    t0: Share = 0.5
    cubed: bool = True
    layer_lr: Literal["shared", "unscaled", "scaled"] = "shared"
    """`shared`: all layers learn at the run's rate. `unscaled`, `scaled`: the authors' rates, beside the run's schedule (they
    have no other: `schedule: {name: constant, warmup: 0}`). After the share u of the steps layer i learns at
    ½ (1 + cos(π · u / t_i)) of the run's rate, `scaled` at 1 / t_i of that again, so that the rates of all layers add up to the
    same; what is above the layers as though frozen at the end, t = 1."""

    def phases(self, n_layers: int, steps: int, seed: int, measured: Measured = ()) -> list[Phase]:
        ends = [(self.t0 + (1 - self.t0) * i / n_layers) ** (3 if self.cubed else 1) for i in range(n_layers)]
        result, start = [], 0.0
        for i, end in enumerate(ends):
            if end > start:
                layers = tuple(range(i, n_layers))
                result.append(Phase(layers, end - start, everything=i == 0, anneal=self._rates(ends, i)))
                start = end
        return [*result, Phase((), 1 - start, anneal=self._rates(ends, n_layers))]

    def _rates(self, ends: list[float], first: int) -> tuple[Anneal, ...]:
        """The rates of what learns where the layers below `first` are frozen."""
        if self.layer_lr == "shared":
            return ()
        wanted = [(self.always, 1.0), *(([f"blocks[{i}]"], end) for i, end in enumerate(ends) if i >= first)]
        if first == 0:
            wanted.append((["all"], ends[0]))
        return tuple(
            Anneal(on, end, 1 / end if self.layer_lr == "scaled" else 1.0) for on, end in wanted if on
        )
