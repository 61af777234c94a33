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
from entasis.study.plan import Comparison, Plan
from entasis.study.results import Outcome
from entasis.study.statistics import ALPHA, Difference
from entasis.study.stopping import Standing

Pairs = list[tuple[Outcome, Outcome]]
"""(Run of what the arm is compared with, arm's run) of seeds that both have finished."""


def pairs_of(study: Study, plan: Plan, done: Mapping[str, Outcome]) -> dict[Comparison, Pairs]:
    """The pairs that are judged: all that are finished, or where seeds are added, those before the first that is not."""
    if study.until is None:
        return {c: results.paired(plan.grid[c.protocol], done, c.arm, c.against) for c in plan.pairs(study)}
    return {c: in_order(plan, c, done)[0] for c in plan.pairs(study)}


def in_order(
    plan: Plan, c: Comparison, done: Mapping[str, Outcome], lost: Collection[str] = ()
) -> tuple[Pairs, str | None]:
    """The pairs of the first seeds, up to one that is not there, and the folder in `lost` that it is not there for."""
    base, own = plan.grid[c.protocol][c.against], plan.grid[c.protocol][c.arm]
    for i, both in enumerate(zip(base, own, strict=True)):
        if missing := [run.folder for run in both if run.folder not in done]:
            found = results.paired({c.against: base[:i], c.arm: own[:i]}, done, c.arm, c.against)
            return found, next((name for name in missing if name in lost), None)
    return results.paired(plan.grid[c.protocol], done, c.arm, c.against), None


def family(study: Study, plan: Plan) -> dict[str, Comparison]:
    """Every comparison once, by its name, under the first protocol that has it."""
    found: dict[str, Comparison] = {}
    for c, name in plan.comparisons(study).items():
        found.setdefault(name, c)
    return found


def differences_of(pairs: Pairs) -> list[float]:
    """The arm minus what it is compared with, bits per byte, seed by seed."""
    return [arm.bits_per_byte - base.bits_per_byte for base, arm in pairs]


def compare(
    study: Study, plan: Plan, pairs: Mapping[Comparison, Pairs]
) -> tuple[dict[str, Difference], dict[str, Standing]]:
    """Every comparison that has a pair, by its name; and its looks, where seeds are added.

    Noise is pooled over all comparisons with the baseline, and over all contrasts: arms may differ more from the
    baseline than from one another.
    """
    planned = family(study, plan)
    judged = {name: pairs[c] for name, c in planned.items() if pairs[c]}
    with_baseline = [name for name in judged if planned[name].against == study.baseline]
    contrasts = [name for name in judged if planned[name].against != study.baseline]
    measured: dict[str, Difference] = {}
    for names in (with_baseline, contrasts):
        measured |= _measured({name: judged[name] for name in names}, study.margin)
    if study.until is None:
        return statistics.adjust(measured, len(planned)), {}
    values = {name: differences_of(p) for name, p in judged.items()}
    standings = stopping.standings(values, study.until, comparisons=len(planned), margin=study.margin)
    return {
        name: stopping.restated(d, standings[name], study.until, study.margin) for name, d in measured.items()
    }, standings


def _measured(judged: Mapping[str, Pairs], margin: float) -> dict[str, Difference]:
    """Comparisons with one pooled noise, before anything is adjusted."""
    # Two arms that round to one shape repeat each other's noise, and count once in it.
    distinct: dict[str, str] = {}
    for name, p in judged.items():
        recipes = [[run.run.recipe for run in both] for both in p]
        distinct.setdefault(json.dumps(recipes, sort_keys=True), name)
    return statistics.compare(
        {name: differences_of(p) for name, p in judged.items()},
        margin=margin,
        evaluation_errors={name: _evaluation_error(p) for name, p in judged.items()},
        noise_from=distinct.values(),
    )


@dataclass(frozen=True, slots=True)
class Control:
    """What is known of a positive control; without a finished pair, nothing."""

    difference: Difference | None = None
    p: float | None = None
    """One-sided, of this comparison alone; None where it is judged by another method, or not yet."""
    seen: bool = False


def controls(
    study: Study, plan: Plan, pairs: Mapping[Comparison, Pairs], protocol: Protocol
) -> dict[str, Control]:
    """What is known of each positive control under one protocol, by its arm."""
    found: dict[str, Control] = {}
    for name, c in plan.controls(study, protocol).items():
        own = pairs[c]
        if not own:
            found[c.arm] = Control()
            continue
        values = differences_of(own)
        d = statistics.compare(
            {name: values}, margin=study.margin, evaluation_errors={name: _evaluation_error(own)}
        )[name]
        if study.until is None:
            p = statistics.one_sided_p(values)
            seen = p < ALPHA
            found[c.arm] = Control(dataclasses.replace(d, p=p), None if math.isnan(p) else p, seen)
        else:
            looks = stopping.follow(values, study.until, max(1, len(family(study, plan))))
            p = looks[-1].p if looks else math.nan
            seen = stopping.sees(looks) is not None
            alone = Standing(alone=looks, together=looks, p_holm=p, answer=None)
            d = stopping.restated(d, alone, study.until, study.margin)
            found[c.arm] = Control(dataclasses.replace(d, p=p), None, seen)
    return found


def _evaluation_error(pairs: Sequence[tuple[Outcome, Outcome]]) -> float:
    """From the choice of documents: NLL differences of each document, averaged over seeds, bootstrapped."""
    nll = np.mean([arm.documents[0] - base.documents[0] for base, arm in pairs], axis=0)
    return statistics.evaluation_error(nll, pairs[0][0].documents[1])
