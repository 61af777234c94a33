"""Stages: stretches of a run, each with a model, an optimizer, a schedule and a budget of its own. Needs no torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from entasis import quantities
from entasis.configuration import parse
from entasis.errors import UserError
from entasis.grow import provenance, transitions
from entasis.grow.provenance import Lineage
from entasis.grow.resize import ResizePlan
from entasis.grow.transitions import Transition
from entasis.shape import cost, layout, selectors
from entasis.shape.shapes import ModelShape
from entasis.train.recipe import Data, Optimizer
from entasis.train.resolved_recipe import ResolvedRecipe, ResolvedStage
from entasis.train.resolved_recipe import steps as count_steps
from entasis.train.schedule import Schedule


@dataclass(frozen=True)
class StageSpan:
    """One stage laid out: steps `start` to `stop` of the run, and the model that is trained in them."""

    index: int
    own: ResolvedStage
    """What the recipe says of this stage alone. What it takes from the recipe where it says nothing is in the fields below."""
    data: Data
    batch_tokens: int
    optimizer: Optimizer
    start: int
    stop: int
    tokens_before: int
    """Tokens of all stages before."""
    shape: ModelShape
    lineage: Lineage
    """Of every layer the id that it keeps when layers are inserted before it, and what the last transition made it of."""
    trainable: tuple[str, ...]
    """Names of the parameters that learn."""
    transition: tuple[Transition, ResizePlan, ModelShape] | None
    """What makes this stage's model, how, and the shape of the one before."""
    optimizer_state: str
    adapted: tuple[str, ...] = ()
    """Names of the matrices that have a LoRA adapter in this stage."""
    warmup_new: int = 0
    """Steps over which the learning rate of the newest layers rises to the others'."""
    annealed: Mapping[str, int] = field(default_factory=dict)
    """Which entry of `own.anneal` the rates of parameters follow besides."""

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each LoRA adapter, by the matrix adapted."""
        lora = self.own.lora
        return {} if lora is None else dict.fromkeys(self.adapted, lora.rank)

    @property
    def steps(self) -> int:
        return self.stop - self.start

    @property
    def sequences(self) -> int:
        """Sequences per optimizer step over all ranks."""
        return self.batch_tokens // self.data.sequence

    @functools.cached_property
    def flops_per_token(self) -> int:
        """Training FLOPs per token: forward of all layers, backward of what needs gradients. Asked for at every step."""
        return cost.stage_flops_per_token(self.shape, self.trainable, self.data.sequence, ranks=self.ranks)

    @property
    def flops(self) -> int:
        """Training FLOPs of all its steps."""
        return self.steps * self.batch_tokens * self.flops_per_token

    @property
    def schedule(self) -> Schedule:
        return self.own.schedule

    @property
    def counts(self) -> cost.Counts:
        """Parameters that learn, that do not, and both together."""
        return cost.count_uses(self.shape, self.trainable, ranks=self.ranks)

    @property
    def first_trained(self) -> int:
        """No gradient is needed below this layer: nothing there learns or has an adapter. 0: all is needed."""
        learns = {*self.trainable, *self.adapted}
        found = [
            p.layer or 0 for p in layout.parameters(self.shape) if p.name in learns and p.part not in _ABOVE
        ]
        return min(found, default=self.shape.n_layers)

    @property
    def newest_parameters(self) -> frozenset[str]:
        """Names of the parameters of the layers that the last transition added, adapters with them."""
        newest = self.lineage.newest
        beside = layout.adapters(self.shape, self.ranks)
        return frozenset(p.name for p in (*layout.parameters(self.shape), *beside) if p.layer in newest)

    def place_of(self, name: str) -> tuple[int | None, str]:
        """A parameter by its layer's id, if it is a layer's, and its name within: the same in every stage."""
        if not name.startswith("blocks."):
            return None, name
        _, i, inside = name.split(".", 2)
        return self.lineage.ids[int(i)], inside

    def provenance(self) -> list[dict[str, Any]]:
        """Where each layer of the stage's model came from, and whether it is frozen."""
        learning = {name.split(".")[1] for name in self.trainable if name.startswith("blocks.")}
        frozen = [i for i in range(self.shape.n_layers) if str(i) not in learning]
        return self.lineage.to_list(frozen)

    def tokens(self, step: int) -> int:
        """Tokens of the whole run after its first `step` steps."""
        return self.tokens_before + (step - self.start) * self.batch_tokens


def costliest(spans: Sequence[StageSpan]) -> StageSpan:
    """The stage that takes most of a run's FLOPs: a step of it is timed for all."""
    return max(spans, key=lambda span: span.flops)


_ABOVE = ("final_norm", "head")
"""Parts behind all layers."""


def lay_out(recipe: ResolvedRecipe, shape: ModelShape, lineage: Lineage | None = None) -> list[StageSpan]:
    """The stages of a resolved recipe, one after another; `shape` is that of the model before them.

    `lineage` is of that model too, where it is not in its folder yet.

    Raises `UserError` for whatever any of them gets wrong.
    """
    result: list[StageSpan] = []
    start = tokens = 0
    n = shape.n_layers
    if lineage is None:
        lineage = provenance.read(recipe.start.folder, n) if recipe.start else provenance.begin(n)
    for index, stage in enumerate(recipe.stages):
        where = f"recipe: stages[{index}]"
        data = recipe.data.replaced(
            train=stage.data.train if stage.data else recipe.data.train,
            sequence=stage.sequence or recipe.data.sequence,
        )
        batch = (stage.batch or recipe.batch).tokens
        changed = None
        if stage.transition is not None:
            if index == 0 and recipe.start is None:
                raise UserError(f"{where}.transition: there is no model before it; draw the shape instead")
            try:
                transition = transitions.read(stage.transition, f"{where}.transition")
                plan = transition.plan(shape)
            except UserError as error:
                if str(error).startswith(where):
                    raise
                raise UserError(f"{where}.transition: {error}") from error
            changed = (transition, plan, shape)
            shape, lineage = plan.shape, lineage.after(plan)
        _check_lengths(batch, data.sequence, shape, "recipe" if len(recipe.stages) == 1 else where)
        steps = count_steps(stage.tokens, batch)
        _check_schedule(stage, steps, where)
        names = selectors.select(shape, stage.trainable, newest=lineage.newest, where=f"{where}.trainable")
        adapted = _adapted(stage, shape, lineage, names, where)
        ranks = dict.fromkeys(adapted, stage.lora.rank if stage.lora else 0)
        beside = layout.adapters(shape, ranks)
        names += [p.name for p in beside]
        optimizer = _optimizer_of(recipe, stage, where)
        result.append(
            StageSpan(
                index, stage, data, batch, optimizer, start, start + steps, tokens, shape, lineage, tuple(names), changed,
                _optimizer_state(recipe, stage, changed, optimizer, result, where), adapted,
                _warmup_new(stage, steps, lineage, where), _annealed(stage, shape, lineage, names, ranks, where),
            )
        )  # fmt: skip
        _check_trainable(result[-1], where)
        if recipe.average is not None and adapted:
            raise UserError(
                f"{where}: has lora, and the recipe an average, which would be of adapters' factors instead of weights; leave one out"
            )
        start, tokens = start + steps, tokens + steps * batch
    if recipe.data.validation is not None and recipe.data.sequence > shape.context:
        raise UserError(
            f"recipe: data.sequence is {recipe.data.sequence}, at which held-out text is scored: longer than the shape's "
            f"context {shape.context}"
        )
    return result


def flops_per_token(spans: Sequence[StageSpan]) -> int:
    """Training FLOPs per token of a whole run: its FLOPs over its tokens."""
    total = sum(span.steps * span.batch_tokens for span in spans)
    return round(sum(span.flops for span in spans) / total)


def _optimizer_of(recipe: ResolvedRecipe, stage: ResolvedStage, where: str) -> Optimizer:
    optimizer = recipe.optimizer
    if stage.optimizer is not None:
        if stage.lr is not None and "lr" in stage.optimizer:
            raise UserError(f"{where}: gives both lr and optimizer.lr, which are the same")
        optimizer = parse(Optimizer, {**optimizer.model_dump(), **stage.optimizer}, f"{where}.optimizer")
        for key in ("parametrisation", "base_width", "base_head_dim"):
            if getattr(optimizer, key) != getattr(recipe.optimizer, key):
                raise UserError(
                    f"{where}.optimizer.{key}: is the whole run's, as muP's scales are in the model"
                )
    if stage.lr is not None:
        optimizer = optimizer.replaced(lr=stage.lr)
    return optimizer


def check_parametrisation(optimizer: Optimizer) -> None:
    """Refuses muP without the width that lr was found at, and that width without muP. Raises `UserError`."""
    if optimizer.parametrisation == "mup":
        if optimizer.base_width is None:
            raise UserError(
                "recipe: optimizer.parametrisation is mup; give optimizer.base_width, where lr was found"
            )
        return
    for key in ("base_width", "base_head_dim"):
        if getattr(optimizer, key) is not None:
            raise UserError(
                f"recipe: optimizer.{key} is muP's; set optimizer.parametrisation=mup, or leave it out"
            )


def _optimizer_state(
    recipe: ResolvedRecipe,
    stage: ResolvedStage,
    changed: tuple[Transition, ResizePlan, ModelShape] | None,
    optimizer: Optimizer,
    before: Sequence[StageSpan],
    where: str,
) -> str:
    """What becomes of the moments; where the stage does not say it, growth within a run keeps them if it can.

    Raises `UserError` for moments that are not there to be kept.
    """
    same = before and optimizer.name == before[-1].optimizer.name
    if stage.optimizer_state == "keep" and not same:
        raise UserError(
            f"{where}.optimizer_state is keep, but the stage before has another optimizer"
            if before
            else f"{where}.optimizer_state is keep, but no stage is before it; write start.optimizer_state"
        )
    kept = not before and recipe.start is not None and recipe.start.optimizer_state == "keep"
    # A plan's first stretch has nothing to keep but what `start` says.
    if kept and stage.optimizer_state == "reset" and recipe.training_plan is None:
        raise UserError(f"{where}.optimizer_state is reset, and start.optimizer_state keep; leave one out")
    if stage.optimizer_state is not None:
        return stage.optimizer_state
    grows = changed is not None and changed[0].keeps_moments and before
    return "keep" if grows and same else "reset"


def _warmup_new(stage: ResolvedStage, steps: int, lineage: Lineage, where: str) -> int:
    if stage.warmup_new is None:
        return 0
    if not lineage.newest:
        raise UserError(f"{where}.warmup_new: no layer is new; use schedule.warmup")
    return quantities.steps(stage.warmup_new, steps, f"{where}.warmup_new")


def _annealed(
    stage: ResolvedStage,
    shape: ModelShape,
    lineage: Lineage,
    learning: Sequence[str],
    ranks: Mapping[str, int],
    where: str,
) -> dict[str, int]:
    """The entry of `anneal` for each parameter that has one, an adapter's that of its matrix. Raises `UserError`."""
    found: dict[str, int] = {}
    for i, entry in enumerate(stage.anneal):
        here = f"{where}.anneal[{i}]"
        if entry.part[0] >= entry.part[1]:
            raise UserError(f"{here}.part is {list(entry.part)}; write [begin, end], as in [0, 0.5]")
        meant = set(selectors.select(shape, entry.on, newest=lineage.newest, where=f"{here}.on"))
        meant |= {
            p.name for p in layout.adapters(shape, {name: ranks[name] for name in ranks if name in meant})
        }
        if not meant & set(learning):
            raise UserError(f"{here}.on: nothing of what it means learns in this stage")
        found |= {name: i for name in learning if name in meant and name not in found}
    return found


def _check_lengths(tokens: int, sequence: int, shape: ModelShape, where: str) -> None:
    """Refuses numbers that do not go together. Raises `UserError`."""
    if tokens < sequence or tokens % sequence:
        nearest = max(1, round(tokens / sequence)) * sequence
        raise UserError(
            f"{where}: batch.tokens is {tokens}, not a multiple of data.sequence {sequence}; the nearest is {nearest}"
        )
    if sequence > shape.context:
        raise UserError(
            f"{where}: data.sequence is {sequence}, longer than the shape's context {shape.context}; "
            "set shape.context"
        )


def _adapted(
    stage: ResolvedStage, shape: ModelShape, lineage: Lineage, learning: Sequence[str], where: str
) -> tuple[str, ...]:
    """The matrices of the layers that get a LoRA adapter. Raises `UserError`."""
    if stage.lora is None:
        return ()
    on, here = stage.lora.on, f"{where}.lora.on"
    matrices = [p.name for p in layout.parameters(shape) if p.is_matrix and p.layer is not None]
    for term in [on] if isinstance(on, str) else on:
        if term.startswith("not "):
            continue
        alone = selectors.select(shape, term, newest=lineage.newest, where=here)
        if not set(matrices).intersection(alone):
            raise UserError(f"{here}: an adapter stands beside a matrix of a layer, and {term} has none")
    meant = set(selectors.select(shape, on, newest=lineage.newest, where=here))
    found = [name for name in matrices if name in meant]
    if not found:
        raise UserError(f"{here}: there is no matrix of a layer among what it means")
    theirs = {name.removesuffix("weight") + end for name in found for end in ("weight", "bias")}
    if both := [name for name in learning if name in theirs]:
        raise UserError(
            f"{where}: {both[0]} learns and has an adapter; adapters stand beside frozen matrices and biases, as with "
            "trainable: [final_norm, head]"
        )
    return tuple(found)


def _check_trainable(span: StageSpan, where: str) -> None:
    """Refuses a stage that trains more than it may, warms up nothing, or caches the outputs of no layer. Raises `UserError`."""
    if span.warmup_new and not span.newest_parameters & set(span.trainable):
        raise UserError(f"{where}.warmup_new: nothing of the new layers learns in this stage; leave it out")
    active, most = span.counts.active, span.own.active_parameters
    if most is not None and active > most:
        raise UserError(
            f"{where}: active_parameters is {most:,}, but trainable is {active:,}; train less of the model"
        )
    if span.own.cache_frozen and not span.first_trained:
        raise UserError(f"{where}: cache_frozen is true, but no layer is frozen below the first that learns")


def _check_schedule(stage: ResolvedStage, steps: int, where: str) -> None:
    schedule = stage.schedule
    if stage.schedule_part is not None:
        begin, end = stage.schedule_part
        if begin >= end:
            raise UserError(f"{where}.schedule_part is {[begin, end]}; write [begin, end], as in [0.2, 0.5]")
        steps = round(steps / (end - begin))
    warmup = quantities.steps(schedule.warmup, steps, "recipe: schedule.warmup")
    decay = quantities.steps(schedule.decay, steps, "recipe: schedule.decay")
    # By the shares as they are written: of an odd number of steps the halves are rounded up to more than all.
    given = [
        quantities.share(value, "") if quantities.is_share(value, "") else int(value) / steps
        for value in (schedule.warmup, schedule.decay)
    ]
    if schedule.name == "warmup-stable-decay" and warmup + decay > steps and sum(given) > 1 + 1e-6:
        raise UserError(f"recipe: schedule.warmup {warmup} and decay {decay} exceed the {steps} steps")
