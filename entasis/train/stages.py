"""Stages: which parameters learn in a stretch of training, and where in the run it lies."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from entasis.errors import UserError
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


def select(model: nn.Module, stage: Stage) -> list[str]:
    """Sets `requires_grad` as the stage says; returns the names of the parameters that learn.

    Raises `UserError` for a pattern that no parameter matches.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = names
    if isinstance(stage.train, list):
        for pattern in stage.train:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)[0]
                raise UserError(f"recipe: stage's train: no parameter matches {pattern!r}; one is {near}")
        chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in stage.train)]
        if not chosen:
            raise UserError("recipe: stage's train is an empty list; nothing would learn")
    learns = set(chosen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learns)
    return chosen
