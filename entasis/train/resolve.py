"""From a recipe as written to a resolved one. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entasis import quantities
from entasis.errors import UserError
from entasis.files import read_json
from entasis.shape import specification
from entasis.shape.interfaces import Glyph
from entasis.shape.shapes import ModelShape
from entasis.shape.solve import Solution
from entasis.train.recipe import Optimizer, Recipe, Stage, Start
from entasis.train.resolved_recipe import (
    ResolvedAverage,
    ResolvedCheckpoint,
    ResolvedEvaluation,
    ResolvedRecipe,
    ResolvedSamples,
    ResolvedStage,
    resolved_stages_of_plan,
    stages_of_plan,
    steps,
)
from entasis.train.stages import StageSpan, check_parametrisation, lay_out
from entasis.train.training_plans import plan as training_plans


def resolve(
    recipe: Recipe, vocabulary: int, before: StageSpan | None = None
) -> tuple[ResolvedRecipe, ModelShape, list[str]]:
    """The recipe with nothing left open but what depends on the machine, its shape, and the solver's notes.

    `vocabulary` is the corpus's; a shape that names none gets it. `before` is the last stage of the run to start
    from, where that is not trained yet. Raises `UserError`.
    """
    solution = _solve(recipe, vocabulary, before.shape if before else None)
    if recipe.evaluation.tokens is not None and recipe.evaluation.bytes is not None:
        raise UserError("recipe: evaluation has tokens and bytes; give one limit")
    if recipe.parallel.shard is not None and recipe.parallel.kind != "hsdp":
        raise UserError(
            f"recipe: parallel.shard is {recipe.parallel.shard} under parallel.kind {recipe.parallel.kind}; "
            "it is a number of processes, and only for hsdp"
        )
    if any(stage.cache_frozen for stage in recipe.stages):
        if recipe.compile is True:
            raise UserError(
                "recipe: compile is true and a stage has cache_frozen, which is eager; leave one out"
            )
        recipe = recipe.replaced(compile=False)
    if recipe.training_plan is not None:
        recipe = _with_plan(recipe, solution.shape)
        assert recipe.tokens is not None
        stages, tokens = (
            [stage.narrowed(ResolvedStage, schedule=recipe.schedule) for stage in recipe.stages],
            recipe.tokens,
        )
    else:
        stages, tokens = _resolve_stages(recipe)
    whole = stages
    if recipe.training_plan is not None:
        # As far as it is known before anything is measured.
        alike = training_plans.read(recipe.training_plan).alike(solution.shape.n_layers)
        whole = resolved_stages_of_plan(recipe, solution.shape, alike)
    total = sum(steps(stage.tokens, (stage.batch or recipe.batch).tokens) for stage in whole)
    result = recipe.narrowed(
        ResolvedRecipe,
        shape=solution.shape.to_dict(),
        stages=stages,
        tokens=tokens,
        evaluation=recipe.evaluation.narrowed(
            ResolvedEvaluation, every=_every(recipe.evaluation.every, total, "evaluation.every")
        ),
        average=_average(recipe, total),
        samples=recipe.samples
        and recipe.samples.narrowed(
            ResolvedSamples, every=_every(recipe.samples.every, total, "samples.every")
        ),
        checkpoint=recipe.checkpoint.narrowed(
            ResolvedCheckpoint, every=_every(recipe.checkpoint.every, total, "checkpoint.every")
        ),
    )
    # With what a plan does after its measurement, so that its mistakes are found before that.
    lay_out(result.replaced(stages=tuple(whole)), solution.shape, before.lineage if before else None)
    return result, solution.shape, list(solution.notes)


def _with_plan(recipe: Recipe, shape: ModelShape) -> Recipe:
    """The recipe with its plan's options spelt out and its stages, up to the plan's first measurement. Raises `UserError`."""
    assert recipe.training_plan is not None
    if recipe.tokens is None:
        raise UserError("recipe: tokens is missing; say how many tokens to train on, such as 5M")
    plan = training_plans.read(recipe.training_plan)
    stages = stages_of_plan(recipe, shape)
    if recipe.stages and tuple(s.replaced(schedule=None) for s in recipe.stages) != stages:
        raise UserError("recipe: gives both training_plan and stages; leave one out")
    name = next(iter(recipe.training_plan))
    if plan.spend == "flops":
        # Stretches differ in their steps' price, so numbers of steps would be another length in each.
        nominal, shares = steps(recipe.tokens, recipe.batch.tokens), {}
        for key in ("warmup", "decay"):
            if not isinstance(value := getattr(recipe.schedule, key), int) or not value:
                continue
            if value > nominal:
                raise UserError(f"recipe: schedule.{key} is {value}, more than the {nominal} steps")
            shares[key] = f"{100 * value / nominal:.6f}%"
        recipe = recipe.replaced(schedule=recipe.schedule.replaced(**shares))
    return recipe.replaced(training_plan={name: plan.model_dump()}, stages=stages)


def _solve(recipe: Recipe, vocabulary: int, weights: ModelShape | None) -> Solution:
    """The first stage's shape: drawn, or that of the weights to start from. Raises `UserError`."""
    wanted = dict(recipe.shape or {})
    check_parametrisation(recipe.optimizer)
    there = Solution(weights or shape_of(recipe.start)) if recipe.start else None
    if there and recipe.shape is None:
        return _with_mup_notes(there, recipe.optimizer)
    if "preset" not in wanted:
        wanted.setdefault("vocabulary", vocabulary)
    solution = specification.resolve(wanted)
    if recipe.optimizer.parametrisation == "mup":
        solution = with_mup_scales(solution, wanted, recipe.optimizer)
    if there:
        ours, theirs = solution.shape.interface, there.shape.interface
        if isinstance(ours, Glyph) and isinstance(theirs, Glyph) and ours.bitmaps is None:
            # Filled in when the run that made the weights began.
            interface = ours.replaced(bitmaps=theirs.bitmaps)
            shape = dataclasses.replace(solution.shape, interface=interface)
            solution = dataclasses.replace(solution, shape=shape)
    if there and recipe.start and solution.shape != there.shape:
        raise UserError(
            f"recipe: shape is another than that of {recipe.start.folder}; leave it out, and change it by a transition"
        )
    return solution


def shape_of(start: Start) -> ModelShape:
    """The shape of the weights to start from. Raises `UserError`."""
    path = Path(start.folder) / "shape.json"
    try:
        return ModelShape.from_dict(read_json(path))
    except FileNotFoundError as error:
        raise UserError(
            f"recipe: start.from is {start.folder}, which holds no {path.name}; name a finished run, a checkpoint that "
            "was kept, or an imported model"
        ) from error


def _with_mup_notes(there: Solution, optimizer: Optimizer) -> Solution:
    """The shape of weights to start from, which keep their function: with notes where muP has other scales."""
    if optimizer.parametrisation != "mup":
        return there
    wanted = {name: getattr(there.shape, name) for name in ("logit_scale", "attention_scale")}
    notes = with_mup_scales(there, wanted, optimizer).notes
    return dataclasses.replace(
        there, notes=tuple(f"{note}; the model to start from keeps its own" for note in notes)
    )


def with_mup_scales(solution: Solution, wanted: Mapping[str, Any], optimizer: Optimizer) -> Solution:
    """The shape with muP's part of the function, but for fields that the specification `wanted` names itself.

    Logits shrink with the width. Products of queries and keys shrink with head_dim instead of its root, and are as
    ever at the base's head_dim; norms on queries and keys bound them already.
    """
    shape, width, head_dim = solution.shape, optimizer.base_width, optimizer.base_head_dim
    assert width is not None
    scales: dict[str, float | None] = {"logit_scale": width / shape.d_model}
    if shape.qk_norm == "none":
        same = head_dim is None or head_dim == shape.head_dim
        scales["attention_scale"] = None if same else math.sqrt(head_dim or 0) / shape.head_dim
    notes = [
        f"{name} is {wanted[name]!r} as the shape says, where muP has {scale!r}"
        for name, scale in scales.items()
        if name in wanted and wanted[name] != scale
    ]
    missing: dict[str, Any] = {name: scale for name, scale in scales.items() if name not in wanted}
    shape = dataclasses.replace(shape, **missing)
    return dataclasses.replace(solution, shape=shape, notes=(*solution.notes, *notes))


def _resolve_stages(recipe: Recipe) -> tuple[list[ResolvedStage], int]:
    """The stages with their tokens and schedules, and all tokens."""
    stages, total = [], 0
    for i, stage in enumerate(recipe.stages or (Stage(),)):
        given = stage.tokens
        if given is None and recipe.tokens is not None and i + 1 >= len(recipe.stages):
            given = recipe.tokens - total
            if given <= 0:
                raise UserError(
                    f"recipe: the stages before the last take {total:,} tokens, no fewer than there are"
                )
        if given is None:
            missing = f"stages[{i}].tokens" if recipe.stages else "tokens"
            raise UserError(f"recipe: {missing} is missing; say how many tokens to train on, such as 5M")
        batch = (stage.batch or recipe.batch).tokens
        tokens = quantities.tokens(given, recipe.tokens, batch, f"recipe: stages[{i}].tokens")
        stages.append(
            stage.narrowed(ResolvedStage, tokens=tokens, schedule=stage.schedule or recipe.schedule)
        )
        total += tokens
    if recipe.tokens is not None and recipe.tokens != total:
        raise UserError(f"recipe: tokens is {recipe.tokens}, but the stages add up to {total}; leave one out")
    return stages, total


def _average(recipe: Recipe, total: int) -> ResolvedAverage | None:
    average = recipe.average
    if average is None:
        return None
    if (average.ema is None) == (average.last is None):
        raise UserError(
            "recipe: average takes one of ema (a decay, such as 0.99) and last (a number, such as 5)"
        )
    return average.narrowed(ResolvedAverage, every=_every(average.every, total, "average.every"))


def _every(value: int | str | None, total: int, where: str) -> int | None:
    if str(value).strip() in ("0", "0%"):
        raise UserError(f"recipe: {where} is 0; write a number of steps from 1, a share of them (2%) or null")
    return None if value is None else max(1, quantities.steps(value, total, f"recipe: {where}"))
