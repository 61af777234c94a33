"""Stages: which parameters learn in a stretch of training, and where in the run it lies."""

from __future__ import annotations

from dataclasses import dataclass

from entasis.model.transformer import Transformer
from entasis.shape import selectors
from entasis.train.recipe import Recipe, Stage


@dataclass(frozen=True)
class Stretch:
    """One stage laid out: steps `start` to `stop` of the run."""

    index: int
    stage: Stage
    start: int
    stop: int

    @property
    def steps(self) -> int:
        return self.stop - self.start


def lay_out(recipe: Recipe) -> list[Stretch]:
    """The stages of a resolved recipe, one after another."""
    result, start = [], 0
    for index, stage in enumerate(recipe.stages):
        stop = start + recipe.steps(stage)
        result.append(Stretch(index, stage, start, stop))
        start = stop
    return result


def select(model: Transformer, stage: Stage) -> list[str]:
    """Sets `requires_grad` as the stage says; returns the names of the parameters that learn. Raises `UserError`."""
    chosen = selectors.select(model.shape, stage.trainable, where="recipe: trainable")
    learns = set(chosen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learns)
    return chosen
