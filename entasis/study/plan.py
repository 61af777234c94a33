"""From a study to its runs: shapes solved, budgets compared, tokens set by the protocol, everything priced.

Nothing here needs torch. What is found before the main runs (a learning-rate sweep's runs, measured throughput)
sets their learning rates and lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from entasis.errors import UserError
from entasis.shape import specification
from entasis.study import trunks
from entasis.study.arms import Arm, Findings, batch_tokens
from entasis.study.config import Protocol, Study, changed
from entasis.study.equal_cost import check_length, stage_tokens_of
from entasis.train import recipe as recipes
from entasis.train.resolve import resolve, shape_of, with_mup_scales
from entasis.train.timeline import Timeline
from entasis.train.training_plans import plan as training_plans

Kind = Literal["main", "sweep", "trunk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One run: its folder (relative to the study's), its recipe, and what it costs."""

    kind: Kind
    arm: str
    seed: int
    folder: str
    recipe: dict[str, Any] = field(repr=False)
    tokens: int
    flops: int
    multiplier: float = 1.0
    needs: PlannedRun | None = field(default=None, repr=False)
    """The trunk's run that it starts from."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One arm against another, under one protocol."""

    protocol: Protocol
    arm: str
    against: str
    """The baseline, or what a contrast names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The main grid: per protocol and arm one run a seed. Runs that protocols share are the same object."""

    arms: dict[str, Arm]
    grid: dict[Protocol, dict[str, list[PlannedRun]]]

    @property
    def runs(self) -> list[PlannedRun]:
        """Every run once, seed by seed, so that a study cut short still has whole pairs."""
        unique = {run.folder: run for arms in self.grid.values() for runs in arms.values() for run in runs}
        return sorted(unique.values(), key=lambda run: run.seed)

    def is_twin(self, c: Comparison) -> bool:
        """Whether the arm's runs repeat those of what it is compared with: shapes that round to one."""
        arm, against = ([run.recipe for run in self.grid[c.protocol][name]] for name in (c.arm, c.against))
        return arm == against

    def name(self, c: Comparison) -> str:
        """The same for what two protocols share."""
        arms = self.grid[c.protocol]
        return f"{arms[c.arm][0].folder} - {arms[c.against][0].folder}"

    def pairs(self, study: Study) -> list[Comparison]:
        """Every arm beside the baseline, controls and twins too, and the contrasts, under each protocol."""
        others = [(arm, study.baseline) for arm in study.arms if arm != study.baseline]
        return [Comparison(p, *both) for p in self.grid for both in [*others, *study.contrasted]]

    def comparisons(self, study: Study) -> dict[Comparison, str]:
        """What is judged together, with its name; what two protocols share has one name in both."""
        return {
            c: self.name(c) for c in self.pairs(study) if not self.arms[c.arm].control and not self.is_twin(c)
        }

    def controls(self, study: Study, protocol: Protocol | None = None) -> dict[str, Comparison]:
        """Comparisons of the positive controls, each once by its name, under one protocol; under all, if none is given."""
        found: dict[str, Comparison] = {}
        for c in self.pairs(study):
            if self.arms[c.arm].control and protocol in (None, c.protocol):
                found.setdefault(self.name(c), c)
        return found


def solve(study: Study, vocabulary: int | None = None) -> dict[str, Arm]:
    """Each trunk's and arm's shape and price. `vocabulary` serves shapes that name none.

    Raises `UserError` for arms that cannot exist, for arms whose length cannot be what a protocol asks for, and under
    the protocol `params` for arms whose parameters are further from the baseline's than the tolerance.
    """
    arms: dict[str, Arm] = {}
    for name in _order(study):
        try:
            arms[name] = _arm(study, name, study.changes_of(name), vocabulary, arms)
        except UserError as error:
            what = "trunk" if name in study.trunks else "arm"
            raise UserError(f"study {study.name}: {what} {name}: {error}") from error
    arms = {name: arms[name] for name in [*study.trunks, *study.arms]}
    base = arms[study.baseline]
    for name in study.arms:
        arms[name] = _told_apart(arms[name], base)
        if name in study.controls:
            arms[name] = dataclasses.replace(arms[name], control=True)
            if arms[name].recipe == base.recipe:
                raise UserError(
                    f"study {study.name}: control {name} is {base.name} itself; say what it changes"
                )
        else:
            check_length(study, arms, arms[name])
    if "params" in study.protocols:
        for arm in (arms[name] for name in study.arms if name not in study.controls):
            off = arm.parameters / base.parameters - 1
            if abs(off) > study.tolerance:
                raise UserError(
                    f"study {study.name}: arm {arm.name} has {arm.parameters:,} parameters, {off:+.2%} from "
                    f"{base.name}'s {base.parameters:,}; the tolerance is {study.tolerance:.2%}. Give the arms one "
                    "shape.budget, or raise tolerance"
                )
    return arms


def _order(study: Study) -> list[str]:
    """The baseline with its trunks first: under muP their width is where the others' learning rates are scaled from."""
    first = [study.baseline]
    while (trunk := study.trunk_of(first[0])) is not None:
        first.insert(0, trunk)
    return list(dict.fromkeys([*first, *study.trunks, *study.arms]))


def preparatory(study: Study, arms: Mapping[str, Arm]) -> list[PlannedRun]:
    """The runs that must be finished before the main grid can be laid out. Raises `UserError`."""
    runs = []
    if study.sweep:
        for seed in study.sweep.seeds:
            for name in (name for name in study.arms if name not in study.controls):
                changes = {**study.arms[name], **study.sweep.changes}
                try:
                    arm = _arm(study, name, changes, arms[name].shape.vocabulary, arms)
                except UserError as error:
                    raise UserError(f"study {study.name}: sweep of arm {name}: {error}") from error
                recipe = changed(arm.recipe, {"evaluation.part": "selection"})
                for multiplier in study.sweep.multipliers:
                    plain = _with_rate(recipe, multiplier)
                    folder = f"sweep/{name}/lr-{multiplier:g}/seed-{seed}"
                    runs.append(_run(arms, arm, plain, seed, folder, "sweep", arm.stage_tokens, multiplier))
    return runs


def lay_out(study: Study, arms: Mapping[str, Arm], findings: Findings) -> Plan:
    """The main grid. Raises `UserError` where a finding that it needs is missing."""
    grid: dict[Protocol, dict[str, list[PlannedRun]]] = {}
    seen: dict[tuple[str, int], str] = {}
    for protocol in study.protocols:
        grid[protocol] = {}
        for arm in (arms[name] for name in study.arms):
            lengths = stage_tokens_of(study, arms, arm, protocol, findings)
            # An arm that two protocols train equally long is trained once.
            folder = seen.setdefault(
                (arm.name, sum(lengths)),
                arm.name if protocol == study.protocols[0] else f"{arm.name}@{protocol}",
            )
            multiplier = findings.multiplier.get(study.baseline if arm.control else arm.name, 1.0)
            plain = _with_rate(_with_lengths(arm, lengths), multiplier)
            grid[protocol][arm.name] = [
                _run(arms, arm, plain, seed, f"runs/{folder}/seed-{seed}", "main", lengths, multiplier)
                for seed in study.seeds
            ]
    return Plan(arms=dict(arms), grid=grid)


def _arm(
    study: Study, name: str, changes: Mapping[str, Any], vocabulary: int | None, solved: Mapping[str, Arm]
) -> Arm:
    plain = changed(study.base_of(name), changes)
    if study.learning_rate == "mup":
        optimizer_keys = plain.get("optimizer")
        asked = optimizer_keys.get("parametrisation", "mup") if isinstance(optimizer_keys, Mapping) else "mup"
        if asked != "mup":
            raise UserError(
                f"optimizer.parametrisation is {asked!r}, but the study's learning_rate is mup; leave one of them out"
            )
        plain = changed(plain, {"optimizer.parametrisation": "mup"})
    trunk = solved[found] if (found := trunks.named_in(plain)) else None
    if trunk:
        plain["start"] = {"data_position": "keep", **plain["start"], "from": trunks.folder_of(trunk.name)}
    own = {str(key).split(".")[0] for key in changes}
    if plain.get("start") and (trunk or "start" in own) and "shape" not in own:
        plain["shape"] = None  # that of the weights, not the base's
    if "stages" in own and "tokens" not in own:
        _share_tokens(plain)
    # Misspelt keys and wrong types are named before anything is solved.
    written = recipes.from_dict(plain)
    optimizer = written.optimizer
    wanted = dict(plain.get("shape") or {})
    before = trunk.stages[-1] if trunk else None
    if written.start and written.shape is None:
        wanted = (before.shape if before else shape_of(written.start)).to_dict()
    if vocabulary is not None and "preset" not in wanted:
        wanted.setdefault("vocabulary", vocabulary)
    solution = specification.resolve(wanted)
    shape = solution.shape
    if optimizer.parametrisation == "mup":
        base = solved.get(study.baseline) or next(iter(solved.values()), None)
        base_shape = base.shape if base else shape
        optimizer.base_width = optimizer.base_width or base_shape.d_model
        optimizer.base_head_dim = optimizer.base_head_dim or base_shape.head_dim
        plain["optimizer"] |= {"base_width": optimizer.base_width, "base_head_dim": optimizer.base_head_dim}
        # A shape written out in full has every scale: muP's go in now, none can later.
        solution = with_mup_scales(solution, wanted, optimizer)
        shape = solution.shape
    plain["shape"] = shape.to_dict()
    if study.sweep:
        # The rates are chosen on the other documents.
        plain = changed(plain, {"evaluation.part": "test"})
    # Whatever a later stage gets wrong is said before anything is trained.
    resolved, _, _ = resolve(recipes.from_dict(plain), shape.vocabulary, before)
    plain["tokens"] = resolved.tokens
    notes = list(solution.notes)
    if trunk:
        notes.append(f"starts from the run of the trunk {trunk.name} with the same seed")
    elif written.start:
        notes.append(f"starts from {written.start.folder}, whose cost is not counted")
    plan = training_plans.read(resolved.training_plan) if resolved.training_plan else None
    if isinstance(getattr(plan, "importance", None), list):
        notes.append("its importance is given, whose cost is not counted")
    return Arm(
        name=name,
        recipe=plain,
        shape=shape,
        stages=Timeline(resolved, shape, [], before.lineage if before else None).guessed().spans,
        notes=notes,
        trunk=trunk.name if trunk else None,
    )


def _share_tokens(plain: dict[str, Any]) -> None:
    """An arm's own stages take the place of the base's tokens, unless they are parts of them (see `Stage.tokens`)."""
    stages = plain.get("stages")
    last = stages[-1] if isinstance(stages, list) and stages else None
    if isinstance(last, Mapping) and last.get("tokens") is not None:
        plain["tokens"] = None


def _told_apart(arm: Arm, baseline: Arm) -> Arm:
    """Small widths can round two profiles to one shape; a study of a thing against itself should say so."""
    if arm.name == baseline.name or arm.recipe != baseline.recipe:
        return arm
    return dataclasses.replace(arm, notes=[*arm.notes, f"the same shape and recipe as {baseline.name}"])


def _run(
    arms: Mapping[str, Arm],
    arm: Arm,
    plain: dict[str, Any],
    seed: int,
    folder: str,
    kind: Kind,
    lengths: Sequence[int],
    multiplier: float = 1.0,
) -> PlannedRun:
    needs = None
    if arm.trunk is not None:
        trunk = arms[arm.trunk]
        where = trunks.folder_of(trunk.name, seed)
        needs = _run(arms, trunk, trunk.recipe, seed, where, "trunk", trunk.stage_tokens)
        plain = changed(plain, {"start.from": where})
    return PlannedRun(
        kind=kind,
        arm=arm.name,
        seed=seed,
        folder=folder,
        recipe={**plain, "seed": seed},
        tokens=sum(lengths),
        flops=arm.flops(lengths),
        multiplier=multiplier,
        needs=needs,
    )


def _with_lengths(arm: Arm, lengths: Sequence[int]) -> dict[str, Any]:
    """An arm's recipe with the tokens of its stages, and of all of them, set; with a plan only those that the plan goes by."""
    if arm.plan is not None:
        factor, batch = sum(lengths) / sum(arm.stage_tokens), batch_tokens(arm.recipe)
        return changed(arm.recipe, {"tokens": max(1, round(arm.recipe["tokens"] * factor / batch)) * batch})
    result = changed(arm.recipe, {"tokens": sum(lengths)})
    for stage, tokens in zip(result.get("stages") or [], lengths, strict=False):
        stage["tokens"] = tokens
    return result


def _with_rate(plain: Mapping[str, Any], multiplier: float) -> dict[str, Any]:
    """A recipe with every learning rate in it, the stages' own too, so many times as high."""
    if multiplier == 1.0:
        return changed(plain, {})
    rate = (plain.get("optimizer") or {}).get("lr", recipes.Optimizer().lr)
    result = changed(plain, {"optimizer.lr": float(rate) * multiplier})
    for stage in result.get("stages") or []:
        for part in (stage, stage.get("optimizer") or {}):
            if part.get("lr") is not None:
                part["lr"] = float(part["lr"]) * multiplier
    return result
