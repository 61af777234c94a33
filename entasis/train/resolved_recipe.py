"""Recipes with nothing left open. They have the keys of `Recipe`, with fewer values. Needs no torch.

    Recipe ── entasis.train.resolve.resolve ──▸ ResolvedRecipe ── entasis.train.auto_settings.choose ──▸ SettledRecipe

A resolved recipe has its list of layers, its stages, and numbers of steps for shares; a settled one has in place of `auto`
what was chosen on this machine, and is what `recipe.yaml` in a run's folder holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from entasis.configuration import Count, parse, read_yaml
from entasis.errors import UserError
from entasis.shape.shapes import ModelShape
from entasis.train.recipe import (
    Average,
    BatchSize,
    Checkpoint,
    Data,
    Evaluation,
    Optimizer,
    Positive,
    Recipe,
    Samples,
    Stage,
)
from entasis.train.schedule import Schedule
from entasis.train.training_plans import plan as training_plans


class ResolvedStage(Stage):
    tokens: Count
    schedule: Schedule


class ResolvedEvaluation(Evaluation):
    every: Positive | None


class ResolvedAverage(Average):
    every: Positive


class ResolvedSamples(Samples):
    every: Positive


class ResolvedCheckpoint(Checkpoint):
    every: Positive | None


class ResolvedRecipe(Recipe):
    """Nothing is left open but what depends on the machine."""

    shape: dict[str, Any]
    """With every field and the list of layers: `ModelShape.to_dict`."""
    tokens: Count
    evaluation: ResolvedEvaluation
    average: ResolvedAverage | None = None
    samples: ResolvedSamples | None = None
    checkpoint: ResolvedCheckpoint
    stages: Annotated[tuple[ResolvedStage, ...], Field(strict=False, min_length=1)]

    @property
    def total_steps(self) -> int:
        """Of the whole run; with a training plan that measures, as if all layers turned out alike."""
        if self.training_plan is None:
            return sum(steps(stage.tokens, (stage.batch or self.batch).tokens) for stage in self.stages)
        shape = ModelShape.from_dict(self.shape)
        alike = training_plans.read(self.training_plan).alike(shape.n_layers)
        whole = resolved_stages_of_plan(self, shape, alike)
        return sum(steps(stage.tokens, self.batch.tokens) for stage in whole)

    @property
    def sequences(self) -> int:
        """Sequences per optimizer step over all ranks, where a stage says nothing else."""
        return self.batch.tokens // self.data.sequence


def steps(tokens: int, batch_tokens: int) -> int:
    """Optimizer steps of a stage, at least one."""
    return max(1, round(tokens / batch_tokens))


def resolved_stages_of_plan(
    recipe: Recipe, shape: ModelShape, measured: training_plans.Measured
) -> list[ResolvedStage]:
    """As `stages_of_plan`, each under the recipe's schedule."""
    found = stages_of_plan(recipe, shape, measured)
    return [stage.narrowed(ResolvedStage, schedule=recipe.schedule) for stage in found]


def stages_of_plan(
    recipe: Recipe, shape: ModelShape, measured: training_plans.Measured = ()
) -> tuple[Stage, ...]:
    """The stages of a recipe's training plan, as far as they are known from what it has measured. Raises `UserError`."""
    assert recipe.training_plan is not None and recipe.tokens is not None
    found = training_plans.lay_out(
        training_plans.read(recipe.training_plan),
        shape,
        steps=steps(recipe.tokens, recipe.batch.tokens),
        batch_tokens=recipe.batch.tokens,
        sequence=recipe.data.sequence,
        seed=recipe.seed,
        measured=measured,
    )
    return tuple(parse(Stage, stage, "recipe: training_plan") for stage in found)


class SettledBatch(BatchSize):
    micro: Positive


class SettledRecipe(ResolvedRecipe):
    """What a run computes, down to how."""

    batch: SettledBatch
    precision: Literal["fp32", "bf16"]
    compile: bool
    attention: Literal["sdpa", "plain", "flex"]


def read_stored(path: Path) -> SettledRecipe:
    """The recipe that a run was begun with; keys of earlier versions have their names of today. Raises `UserError`."""
    source = read_yaml(path, f"recipe {path}")
    if not isinstance(source, dict):
        raise UserError(f"recipe {path}: must be a mapping with shape:, data: and tokens:")
    for part in (source, *(stage for stage in source.get("stages") or [] if isinstance(stage, dict))):
        if isinstance(schedule := part.get("schedule"), dict):
            _rename(schedule, Schedule.renamed)
    if isinstance(optimizer := source.get("optimizer"), dict):
        _rename(optimizer, Optimizer.renamed)
    if isinstance(data := source.get("data"), dict):
        _rename(data, Data.renamed)
    for stage in source.get("stages") or []:
        # It was null in every recipe that could be run.
        stage.pop("grow", None)
        _rename(stage, Stage.renamed)
    return parse(SettledRecipe, source, "recipe")


def _rename(source: dict[str, Any], names: Mapping[str, str]) -> None:
    for old, new in names.items():
        if old in source:
            source[new] = source.pop(old)


def difference(a: Recipe, b: Recipe) -> str | None:
    """The first key whose value differs, with both values; None for equal recipes."""

    def walk(x: Any, y: Any, key: str) -> str | None:
        if isinstance(x, dict) and isinstance(y, dict):
            for name in [*x, *(n for n in y if n not in x)]:
                if found := walk(x.get(name), y.get(name), f"{key}.{name}".lstrip(".")):
                    return found
            return None
        if isinstance(x, list | tuple) and isinstance(y, list | tuple) and len(x) == len(y):
            parts = (walk(v, w, f"{key}[{i}]") for i, (v, w) in enumerate(zip(x, y, strict=True)))
            return next(filter(None, parts), None)
        return None if x == y else f"{key} is {x!r} there and {y!r} here"

    return walk(a.model_dump(by_alias=True), b.model_dump(by_alias=True), "")
