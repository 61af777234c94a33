"""The stages of a run, one after another, as far as they are known: a training plan may measure before it goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from entasis.grow.provenance import Lineage
from entasis.shape.shapes import ModelShape
from entasis.train import stages
from entasis.train.resolved_recipe import ResolvedRecipe, resolved_stages_of_plan
from entasis.train.resolved_recipe import steps as count_steps
from entasis.train.training_plans import plan as training_plans


class Timeline:
    """The stages of a resolved recipe, given what its training plan, if it has one, has measured."""

    def __init__(
        self,
        recipe: ResolvedRecipe,
        shape: ModelShape,
        measured: list[list[float]],
        lineage: Lineage | None = None,
    ) -> None:
        """`measured` holds a number for each layer, as often as the plan has measured the importance of layers.

        `shape` and `lineage` are as for `stages.lay_out`. Raises `UserError`.
        """
        self.recipe, self.shape, self.measured = recipe, shape, measured
        wanted = recipe.training_plan
        self.plan = None if wanted is None else training_plans.read(wanted)
        if measured:
            recipe = recipe.replaced(stages=tuple(resolved_stages_of_plan(recipe, shape, measured)))
        self.spans = stages.lay_out(recipe, shape, lineage)

    @property
    def missing(self) -> training_plans.Measurement | None:
        """The measurement without which nothing is known of what comes after the spans; None where they are all."""
        if self.plan is None or len(self.measured) >= self.plan.measurements:
            return None
        return self.plan.measurement

    @property
    def steps(self) -> int:
        """Steps of the whole run; before the plan's last measurement an estimate from the recipe's tokens."""
        known = self.spans[-1].stop
        if self.missing is None:
            return known
        return max(known + 1, count_steps(self.recipe.tokens, self.recipe.batch.tokens))

    def steps_left(self, step: int, span: stages.StageSpan) -> float:
        """What is left of the run after `step`, in steps of this stage: others may cost more or less."""
        known = sum(s.flops * (s.stop - max(s.start, step)) / s.steps for s in self.spans if s.stop > step)
        return known * span.steps / span.flops + self.steps - self.spans[-1].stop

    def after(self, measured: list[float]) -> Timeline:
        """What is known after one more measurement."""
        return Timeline(self.recipe, self.shape, [*self.measured, measured])

    def guessed(self) -> Timeline:
        """The whole run as it would be if all layers turned out alike: for what must be known before anything is measured."""
        if self.plan is None:
            return self
        return Timeline(self.recipe, self.shape, self.plan.alike(self.shape.n_layers))

    def learning_again(self, span: stages.StageSpan, names: Iterable[str]) -> set[str]:
        """Those of a stage's parameters whose moments a later stage goes on with; all, as long as that is not known."""
        if self.missing is not None:
            return set(names)
        wanted: set[tuple[int | None, str]] = set()
        for later in self.spans[span.index + 1 :]:
            if later.optimizer_state != "keep":
                break
            wanted |= {later.place_of(name) for name in later.trainable}
        return {name for name in names if span.place_of(name) in wanted}

    def describe_stage(self, span: stages.StageSpan) -> dict[str, Any]:
        """What a stage trains, and what it costs."""
        return {
            "stage": span.index,
            "stages": len(self.spans),
            **{f"{use}_parameters": count for use, count in dataclasses.asdict(span.counts).items()},
            "most_active_parameters": span.own.active_parameters,
            "flops_per_token": span.flops_per_token,
        }

    def describe_importance(self) -> dict[str, Any]:
        """What was measured, and what it took; nothing where nothing was."""
        if self.plan is None or self.plan.measurement is None:
            return {}
        each = training_plans.measurement_flops(self.plan, self.shape, self.recipe.data.sequence)
        found = {"layers": self.measured, "flops": each * len(self.measured)}
        return {"importance": {"measure": self.plan.measurement.measure, **found}}
