"""What a study compares, and what its finished runs say of it: one family of comparisons over arms and protocols."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from entasis.study import results, statistics, stopping
from entasis.study.config import Protocol, Study
from entasis.study.plan import Plan
from entasis.study.results import Outcome
from entasis.study.statistics import ALPHA, Difference
from entasis.study.stopping import Standing

Pairs = list[tuple[Outcome, Outcome]]
"""(Baseline's run, arm's run) of seeds that both have finished."""
ByArm = dict[Protocol, dict[str, Pairs]]


def pairs_of(study: Study, plan: Plan, done: Mapping[str, Outcome]) -> ByArm:
    """The pairs that are judged: all that are finished, or where seeds are added, those before the first that is not."""
    others = [arm for arm in study.arms if arm != study.baseline]
    if study.until is None:
        return {
            p: {a: results.paired(plan.grid[p], done, a, study.baseline) for a in others} for p in plan.grid
        }
    return {p: {a: in_order(plan, p, a, study.baseline, done)[0] for a in others} for p in plan.grid}


def in_order(
    plan: Plan,
    protocol: Protocol,
    arm: str,
    baseline: str,
    done: Mapping[str, Outcome],
    lost: Collection[str] = (),
) -> tuple[Pairs, str | None]:
    """The pairs of the first seeds, up to one that is not there, and the folder in `lost` that it is not there for."""
    base, own = plan.grid[protocol][baseline], plan.grid[protocol][arm]
    for i, both in enumerate(zip(base, own, strict=True)):
        if missing := [run.folder for run in both if run.folder not in done]:
            found = results.paired({baseline: base[:i], arm: own[:i]}, done, arm, baseline)
            return found, next((name for name in missing if name in lost), None)
    return results.paired(plan.grid[protocol], done, arm, baseline), None


def family(study: Study, plan: Plan) -> dict[str, tuple[Protocol, str]]:
    """Every comparison once, by its name: the first protocol that has it, and the arm."""
    found: dict[str, tuple[Protocol, str]] = {}
    for key, name in plan.comparisons(study.baseline).items():
        found.setdefault(name, key)
    return found


def differences_of(pairs: Pairs) -> list[float]:
    """Arm minus baseline, bits per byte, seed by seed."""
    return [arm.bits_per_byte - base.bits_per_byte for base, arm in pairs]


def compare(study: Study, plan: Plan, pairs: ByArm) -> tuple[dict[str, Difference], dict[str, Standing]]:
    """Every comparison that has a pair, by its name, with one pooled noise; and its looks, where seeds are added."""
    planned = family(study, plan)
    judged = {name: pairs[p][arm] for name, (p, arm) in planned.items() if pairs[p][arm]}
    # Two arms that round to one shape repeat each other's noise, and count once in it.
    distinct: dict[str, str] = {}
    for name, p in judged.items():
        distinct.setdefault(json.dumps([arm.run.recipe for _, arm in p], sort_keys=True), name)
    values = {name: differences_of(p) for name, p in judged.items()}
    measured = statistics.compare(
        values,
        margin=study.margin,
        evaluation_errors={name: _evaluation_error(p) for name, p in judged.items()},
        noise_from=distinct.values(),
    )
    if study.until is None:
        return statistics.adjust(measured, len(planned)), {}
    standings = stopping.standings(values, study.until, comparisons=len(planned), margin=study.margin)
    return {
        name: stopping.restated(d, standings[name], study.until, study.margin) for name, d in measured.items()
    }, standings


@dataclass(frozen=True, slots=True)
class Control:
    """What is known of a positive control; without a finished pair, nothing."""

    difference: Difference | None = None
    p: float | None = None
    """One-sided, of this comparison alone."""
    seen: bool = False


def controls(study: Study, plan: Plan, pairs: ByArm) -> dict[str, Control]:
    """What is known of each positive control."""
    found: dict[str, Control] = {}
    for name, (protocol, arm) in plan.controls(study.baseline).items():
        own = pairs[protocol][arm]
        if not own:
            found[arm] = Control()
            continue
        values = differences_of(own)
        d = statistics.compare(
            {name: values}, margin=study.margin, evaluation_errors={name: _evaluation_error(own)}
        )[name]
        if study.until is None:
            p = statistics.one_sided_p(values)
            seen = p < ALPHA
        else:
            looks = stopping.follow(values, study.until, max(1, len(family(study, plan))))
            p = looks[-1].p if looks else math.nan
            seen = stopping.sees(looks) is not None
            alone = Standing(alone=looks, together=looks, p_holm=p, answer=None)
            d = stopping.restated(d, alone, study.until, study.margin)
        found[arm] = Control(dataclasses.replace(d, p=p), p, seen)
    return found


def _evaluation_error(pairs: Sequence[tuple[Outcome, Outcome]]) -> float:
    """From the choice of documents: NLL differences of each document, averaged over seeds, bootstrapped."""
    nll = np.mean([arm.documents[0] - base.documents[0] for base, arm in pairs], axis=0)
    return statistics.evaluation_error(nll, pairs[0][0].documents[1])
