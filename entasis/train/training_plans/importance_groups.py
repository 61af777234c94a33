"""The most important layers first, then the next, then all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from entasis.configuration import Share
from entasis.errors import UserError
from entasis.train.training_plans.plan import TRAINING_PLANS, ImportancePlan, Phase


@TRAINING_PLANS.register("importance_groups")
class ImportanceGroups(ImportancePlan):
    """Layers by importance in groups of equal size, the most important group first; then all of them.

    A group's share of the steps follows the mean of what its layers count.
    """

    groups: Annotated[int, Field(ge=1, le=1000)] = 3
    final: Share = 0.4
    """Share of the steps at the end in which everything learns."""

    def spread_over(self, counts: Sequence[float], steps: int, seed: int) -> list[Phase]:
        n_layers = len(counts)
        if self.groups > n_layers:
            raise UserError(
                f"recipe: training_plan: groups is {self.groups}; the model has {n_layers} layers"
            )
        order = sorted(range(n_layers), key=lambda i: -counts[i])
        size, more = divmod(n_layers, self.groups)
        bounds = list(itertools.accumulate((size + (g < more) for g in range(self.groups)), initial=0))
        groups = [sorted(order[a:b]) for a, b in itertools.pairwise(bounds)]
        means = [sum(counts[i] for i in group) / len(group) for group in groups]
        stretches = [
            Phase(tuple(group), (1 - self.final) * mean / sum(means))
            for group, mean in zip(groups, means, strict=True)
        ]
        return [*stretches, Phase((), self.final, everything=True)]
