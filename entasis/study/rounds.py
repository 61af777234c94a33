"""The runs that a study with `until` still needs, round by round; `plan`, `run` and `report` all ask here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from entasis.study import comparisons, results, stopping
from entasis.study.config import Study
from entasis.study.executors import launchers
from entasis.study.plan import Plan, PlannedRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a study asks for, as far as can be told from its finished runs."""

    runs: list[PlannedRun]
    """All of them, the finished ones too, seed by seed."""
    ended: dict[str, str]
    """Comparisons and controls that end before a seed that cannot be had, with the folder of its run."""


def wanted(study: Study, plan: Plan, folder: Path, lost: Collection[str] = ()) -> Wanted:
    """The runs that a study asks for now. `lost` are folders of runs that failed and will not be tried again."""
    if study.until is None:
        return Wanted(runs=plan.runs, ended={})
    done = results.outcomes(folder, plan.runs)
    family, controls = comparisons.family(study, plan), plan.controls(study)
    differences: dict[str, list[float]] = {}
    ended: dict[str, str] = {}
    for name, c in {**family, **controls}.items():
        pairs, failed = comparisons.in_order(plan, c, done, lost)
        differences[name] = comparisons.differences_of(pairs)
        if failed:
            ended[name] = failed
    counts = stopping.needed(
        {name: differences[name] for name in family},
        study.until,
        comparisons=max(1, len(family)),
        margin=study.margin,
        ended=ended.keys() & family.keys(),
    )
    most = max(counts.values(), default=study.until.seeds)
    for name in controls:
        counts[name] = stopping.needed_to_see(differences[name], study.until, max(1, len(family)), most)
    asked: dict[str, PlannedRun] = {}
    for name, c in {**family, **controls}.items():
        for runs in (plan.grid[c.protocol][c.against], plan.grid[c.protocol][c.arm]):
            asked |= {run.folder: run for run in runs[: counts[name]]}
    return Wanted(runs=sorted(asked.values(), key=lambda run: study.seeds.index(run.seed)), ended=ended)


def train(study: Study, plan: Plan, folder: Path, train_all: Callable[[Sequence[PlannedRun]], None]) -> None:
    """Trains what is asked for until nothing is; a run that fails is tried once more, and then given up."""
    failed: dict[str, int] = {}
    while True:
        lost = {name for name, times in failed.items() if times > 1}
        runs = [r for r in wanted(study, plan, folder, lost).runs if r.folder not in lost]
        left = [r for r in runs if not launchers.finished(folder, r)]
        if not left:
            return
        train_all(runs)
        if study.until is None:
            return
        for run in left:
            if not launchers.finished(folder, run):
                failed[run.folder] = failed.get(run.folder, 0) + 1
