"""From a study to its runs: shapes solved, budgets compared, tokens set by the protocol, everything priced.

Nothing here needs torch. What is found before the main runs (a learning-rate sweep's runs, measured throughput)
sets their learning rates and lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from entasis import quantities
from entasis.errors import UserError
from entasis.shape import cost, specification
from entasis.shape.shapes import ModelShape
from entasis.study.config import Protocol, Study, changed
from entasis.train import recipe as recipes
from entasis.train.resolve import resolve, shape_of, with_mup_scales
from entasis.train.stages import flops_per_token
from entasis.train.stages import lay_out as lay_out_stages


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One arm with its shape solved."""

    name: str
    recipe: dict[str, Any]
    shape: ModelShape
    parameters: int
    flops_per_token: int
    """Training: three times forward, attention over the full sequence."""
    notes: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One run: its folder (relative to the study's), its recipe, and what it costs."""

    kind: Literal["main", "sweep"]
    arm: str
    seed: int
    folder: str
    recipe: dict[str, Any] = field(repr=False)
    tokens: int
    flops: int
    multiplier: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found before the main runs."""

    multiplier: dict[str, float] = field(default_factory=dict)
    tokens_per_second: dict[str, float] = field(default_factory=dict)


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

    def twins(self, protocol: Protocol, baseline: str) -> list[str]:
        """Arms whose runs repeat the baseline's: shapes that round to one."""
        runs = {arm: [run.recipe for run in runs] for arm, runs in self.grid[protocol].items()}
        return [arm for arm in runs if arm != baseline and runs[arm] == runs[baseline]]

    def comparisons(self, baseline: str) -> dict[tuple[Protocol, str], str]:
        """What is compared with the baseline under each protocol; what two protocols share has one name in both."""
        return {
            (protocol, arm): f"{runs[0].folder} - {arms[baseline][0].folder}"
            for protocol, arms in self.grid.items()
            for arm, runs in arms.items()
            if arm != baseline and arm not in self.twins(protocol, baseline)
        }


def solve(study: Study, vocabulary: int | None = None) -> dict[str, Arm]:
    """Each arm's shape and price. `vocabulary` serves shapes that name none.

    Raises `UserError` for arms that cannot exist, for arms with a length of their own, and under the protocol
    `params` for arms whose parameters are further from the baseline's than the tolerance.
    """
    arms: dict[str, Arm] = {}
    # The baseline first: under muP its widths are where the others' learning rates are scaled from.
    for name in sorted(study.arms, key=lambda name: name != study.baseline):
        base_shape = arms[study.baseline].shape if arms else None
        try:
            arms[name] = _arm(study, name, study.arms[name], vocabulary, base_shape)
        except UserError as error:
            raise UserError(f"study {study.name}: arm {name}: {error}") from error
    arms = {name: _told_apart(arms[name], arms[study.baseline]) for name in study.arms}
    base = arms[study.baseline]
    for arm in arms.values():
        _check_length(study, arm, base)
    if "params" in study.protocols:
        for arm in arms.values():
            off = arm.parameters / base.parameters - 1
            if abs(off) > study.tolerance:
                raise UserError(
                    f"study {study.name}: arm {arm.name} has {arm.parameters:,} parameters, {off:+.2%} from "
                    f"{base.name}'s {base.parameters:,}; the tolerance is {study.tolerance:.2%}. Give the arms one "
                    "shape.budget, or raise tolerance"
                )
    return arms


def preparatory(study: Study, arms: Mapping[str, Arm]) -> list[PlannedRun]:
    """The runs that must be finished before the main grid can be laid out."""
    runs = []
    if study.sweep:
        for seed in study.sweep.seeds:
            for name in arms:
                changes = {**study.arms[name], **study.sweep.changes}
                arm = _arm(study, name, changes, arms[name].shape.vocabulary, arms[study.baseline].shape)
                recipe = changed(arm.recipe, {"evaluation.part": "selection"})
                for multiplier in study.sweep.multipliers:
                    plain = _with_rate(recipe, multiplier)
                    runs.append(
                        _run(
                            arm,
                            plain,
                            seed,
                            f"sweep/{name}/lr-{multiplier:g}/seed-{seed}",
                            "sweep",
                            multiplier,
                        )
                    )
    return runs


def lay_out(study: Study, arms: Mapping[str, Arm], findings: Findings) -> Plan:
    """The main grid. Raises `UserError` where a finding that it needs is missing."""
    grid: dict[Protocol, dict[str, list[PlannedRun]]] = {}
    seen: dict[tuple[str, int], str] = {}
    for protocol in study.protocols:
        grid[protocol] = {}
        for arm in arms.values():
            tokens = tokens_of(study, arms, arm, protocol, findings)
            # An arm that two protocols train equally long is trained once.
            folder = seen.setdefault(
                (arm.name, tokens), arm.name if protocol == study.protocols[0] else f"{arm.name}@{protocol}"
            )
            multiplier = findings.multiplier.get(arm.name, 1.0)
            plain = _with_rate({**arm.recipe, "tokens": tokens}, multiplier)
            grid[protocol][arm.name] = [
                _run(arm, plain, seed, f"runs/{folder}/seed-{seed}", "main", multiplier)
                for seed in study.seeds
            ]
    return Plan(arms=dict(arms), grid=grid)


def tokens_of(study: Study, arms: Mapping[str, Arm], arm: Arm, protocol: Protocol, findings: Findings) -> int:
    """How long an arm is trained under a protocol, in whole batches."""
    base = arms[study.baseline]
    batch = batch_tokens(arm.recipe)
    wanted = float(quantities.count(arm.recipe.get("tokens"), "tokens"))
    if protocol == "flops":
        wanted = (
            quantities.count(base.recipe.get("tokens"), "tokens") * base.flops_per_token / arm.flops_per_token
        )
    if protocol == "time":
        speed = findings.tokens_per_second
        if study.hours is not None:
            wanted = speed[arm.name] * 3600 * study.hours
        else:
            wanted = (
                quantities.count(base.recipe.get("tokens"), "tokens") * speed[arm.name] / speed[base.name]
            )
    return max(1, round(wanted / batch)) * batch


def _arm(
    study: Study, name: str, changes: Mapping[str, Any], vocabulary: int | None, base_shape: ModelShape | None
) -> Arm:
    plain = changed(study.base, changes)
    if study.learning_rate == "mup":
        plain = changed(plain, {"optimizer.parametrisation": "mup"})
    # Misspelt keys and wrong types are named before anything is solved.
    written = recipes.from_dict(plain)
    optimizer = written.optimizer
    wanted = dict(plain.get("shape") or {})
    if written.start and written.shape is None:
        wanted = shape_of(written.start).to_dict()
    if vocabulary is not None and "preset" not in wanted:
        wanted.setdefault("vocabulary", vocabulary)
    solution = specification.resolve(wanted)
    shape = solution.shape
    if optimizer.parametrisation == "mup":
        base_shape = base_shape or shape
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
    resolved, _, _ = resolve(recipes.from_dict(plain), shape.vocabulary)
    spans = lay_out_stages(resolved, shape)
    plain["tokens"] = resolved.tokens
    return Arm(
        name=name,
        recipe=plain,
        shape=shape,
        parameters=cost.parameters(spans[-1].shape),
        flops_per_token=flops_per_token(spans),
        notes=list(solution.notes),
    )


def _check_length(study: Study, arm: Arm, base: Arm) -> None:
    """Under `params` all arms see the same tokens; under the others the protocol says how many. Raises `UserError`."""
    where = f"study {study.name}: arm {arm.name}"
    for protocol in study.protocols:
        if protocol == "params":
            own, others = (tokens_of(study, {base.name: base}, a, protocol, Findings()) for a in (arm, base))
            if own != others:
                raise UserError(
                    f"{where} trains on {own:,} tokens in batches of {batch_tokens(arm.recipe):,}, {base.name} on {others:,} "
                    f"in batches of {batch_tokens(base.recipe):,}; params compares at equal parameters and tokens: give "
                    "both the same"
                )
            continue
        if arm.name != base.name and "tokens" in study.arms[arm.name]:
            raise UserError(
                f"{where} sets tokens, but under {protocol} its length follows from {base.name}'s; leave it out"
            )
        if any(stage.get("tokens") for stage in arm.recipe.get("stages") or []):
            raise UserError(
                f"{where} sets the tokens of its stages, but under {protocol} the length follows from "
                f"{base.name}'s; use params"
            )


def _told_apart(arm: Arm, baseline: Arm) -> Arm:
    """Small widths can round two profiles to one shape; a study of a thing against itself should say so."""
    if arm.name == baseline.name or arm.recipe != baseline.recipe:
        return arm
    return dataclasses.replace(arm, notes=[*arm.notes, f"the same shape and recipe as {baseline.name}"])


def _run(
    arm: Arm,
    plain: dict[str, Any],
    seed: int,
    folder: str,
    kind: Literal["main", "sweep"],
    multiplier: float = 1.0,
) -> PlannedRun:
    tokens = quantities.count(plain["tokens"], "tokens")
    return PlannedRun(
        kind=kind,
        arm=arm.name,
        seed=seed,
        folder=folder,
        recipe={**plain, "seed": seed},
        tokens=tokens,
        flops=tokens * arm.flops_per_token,
        multiplier=multiplier,
    )


def _with_rate(plain: Mapping[str, Any], multiplier: float) -> dict[str, Any]:
    if multiplier == 1.0:
        return changed(plain, {})
    rate = (plain.get("optimizer") or {}).get("lr", recipes.Optimizer().lr)
    return changed(plain, {"optimizer.lr": float(rate) * multiplier})


def batch_tokens(plain: Mapping[str, Any]) -> int:
    """Tokens of one optimizer step."""
    return quantities.count(
        (plain.get("batch") or {}).get("tokens", recipes.BatchSize().tokens), "batch.tokens"
    )
