"""Growth Transformer Training."""

from __future__ import annotations

import random
from typing import Annotated

from pydantic import Field

from entasis.errors import UserError
from entasis.train.training_plans.plan import TRAINING_PLANS, Measured, Phase, TrainingPlan

Layer = Annotated[int, Field(ge=0, lt=1000)]


@TRAINING_PLANS.register("growth_transformer")
class GrowthTransformer(TrainingPlan):
    """Growth Transformer Training (2603.19348): six phases, each of some layers, the budget by their importance.

    The paper's phases for 12 layers are the defaults: a first core (layers 4, 5; 30 epochs), early layers (1, 2; 20), a
    second core (8, 9; 20), growth (7 to 10), redundant layers scaled by 0.9, maturation of everything (15). It leaves
    open how long growth and redundant layers train, whether positions count from 0, which layers are redundant, and
    whether embedding and head learn in every phase. Our reading: 20 and 15 epochs, from 0, those that no other phase
    names, and `always`. "Epochs" are relative: they are shares of the steps. Redundant layers are scaled as their phase
    begins, not initialised anew; till then they rest, and every forward pass goes through them.
    """

    first_core: list[Layer] = Field(default_factory=lambda: [4, 5])
    early: list[Layer] = Field(default_factory=lambda: [1, 2])
    second_core: list[Layer] = Field(default_factory=lambda: [8, 9])
    growth: list[Layer] = Field(default_factory=lambda: [7, 8, 9, 10])
    redundant: list[Layer] | None = None
    """Null: every layer that no other phase names."""
    left_out: list[Layer] = Field(default_factory=list)
    """Layers that learn in the last phase only ("anti-layers"); the other groups' defaults lose them."""
    redundant_scale: Annotated[float, Field(gt=0, le=10)] = 0.9
    epochs: list[Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: [30.0, 20.0, 20.0, 20.0, 15.0, 15.0], min_length=6, max_length=6
    )
    shuffle: Annotated[int, Field(ge=0)] | None = None
    """A control: the positions are shuffled by this number and the run's seed."""

    def phases(self, n_layers: int, steps: int, seed: int, measured: Measured = ()) -> list[Phase]:
        named = [self._without_left_out(name) for name in ("first_core", "early", "second_core", "growth")]
        taken = set().union(*named, self.left_out)
        rest = [i for i in range(n_layers) if i not in taken]
        if self.redundant is not None:
            rest = self._without_left_out("redundant")
        for layer in (*taken, *rest):
            if layer >= n_layers:
                raise UserError(
                    f"recipe: training_plan: there is no layer {layer}; the model's are 0 to {n_layers - 1}"
                )
        places = list(range(n_layers))
        if self.shuffle is not None:
            random.Random(f"{self.shuffle}/{seed}").shuffle(places)
        total = sum(self.epochs)
        if not total:
            raise UserError("recipe: training_plan: epochs are all 0; nothing would be trained")
        result = []
        for group, epochs in zip([*named, rest], self.epochs, strict=False):
            layers = tuple(sorted(places[i] for i in group))
            scaled = {"layers": list(layers), "factor": self.redundant_scale}
            transition = {"scale": scaled} if group is rest and self.redundant_scale != 1 else None
            if layers and epochs:
                result.append(Phase(layers, epochs / total, transition=transition))
        # Maturation has its own epochs and those of groups without a layer.
        return [*result, Phase((), 1 - sum(phase.share for phase in result), everything=True)]

    def _without_left_out(self, name: str) -> list[int]:
        """The layers of a group. Raises `UserError` where the user put one of them into `left_out` too."""
        group = getattr(self, name)
        both = set(group) & set(self.left_out)
        if both and not self.is_default(name):
            raise UserError(
                f"recipe: training_plan: layer {min(both)} is in {name} and in left_out, whose layers learn in the last "
                "phase only; name it once"
            )
        return [layer for layer in group if layer not in both]
