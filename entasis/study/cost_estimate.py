"""What a study would cost and could show, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from entasis import quantities
from entasis.files import format_bytes
from entasis.progress import duration
from entasis.report.tables import Column, Table
from entasis.study import (
    growth,
    machine,
    results,
    rounds,
    runner,
    statistics,
    stopping,
    throughput,
    trunks,
    verdict,
)
from entasis.study.arms import Arm, active_column, batch_tokens, shown_active
from entasis.study.config import Study
from entasis.study.executors import launchers, local
from entasis.study.executors.worker import Place
from entasis.study.plan import Plan, PlannedRun, solve
from entasis.train.candidates import Settings, from_plain
from entasis.train.stages import costliest

_LIMIT = 60.0
"""Seconds that timing the steps of all shapes may take."""


def estimate(
    study: Study, folder: Path, *, noise: float | None = None, quick: bool = False
) -> dict[str, Any]:
    """The grid with the cost of each run, totals, hours on this device, and the detectable effect.

    Some steps of every distinct shape are timed in worker processes, as many at once as runs will be; `quick` takes a
    third of what a large matrix product reaches instead.

    `noise` is the standard deviation of a paired difference in bits per byte; without one the study's own, or
    that of its finished runs, is taken.
    """
    study, changes = growth.intended(runner.at_home(study), folder)
    arms, prepared, plan = runner.foreseen(study, folder)
    seconds_per_flop, at_once, source = _speeds(study, folder, plan, quick)
    if study.hours is not None and not study.arms.keys() <= throughput.speeds(folder).keys():
        speeds = {name: 1 / (seconds_per_flop[name] * arm.flops_per_token) for name, arm in arms.items()}
        arms, prepared, plan = runner.foreseen(study, folder, speeds)
        changes = [
            *changes,
            f"tokens under time are what {study.hours:g} hours are expected to give; they follow from the measurement "
            "before the runs",
        ]
    asked = rounds.wanted(study, plan, folder).runs

    def seconds(run: PlannedRun) -> float:
        return seconds_per_flop[run.arm] * (run.flops + _validation_flops(run, arms[run.arm], folder))

    def row(name: str, protocol: str, runs: Sequence[PlannedRun]) -> dict[str, Any]:
        counted = [run for run in runs if run.folder in folders]
        return {
            "arm": name,
            "protocol": protocol,
            "parameters": arms[name].parameters,
            "active_parameters": arms[name].active_parameters,
            "flops_per_token": runs[0].flops // runs[0].tokens,
            "tokens": runs[0].tokens,
            "runs": len(counted),
            "flops": runs[0].flops,
            "seconds": seconds(runs[0]),
        }

    first = trunks.needed([*prepared, *asked])
    late = {run.folder for run in results.too_late(study, folder, prepared)}
    left = [
        run
        for run in [*first, *prepared, *asked]
        if run.folder not in late and not launchers.finished(folder, run)
    ]
    folders = {run.folder for run in [*first, *asked]}
    rows = [row(name, "trunk", [r for r in first if r.arm == name]) for name in study.trunks]
    rows += [row(name, p, runs) for p, by_arm in plan.grid.items() for name, runs in by_arm.items()]
    total = sum(r.flops for r in [*first, *prepared, *asked])
    comparisons = len(set(plan.comparisons(study).values()))
    factor = statistics.detectable_effect(1.0, len(study.seeds), max(1, comparisons))
    sd, sd_source = _noise(study, folder, noise)
    return {
        "study": study.name,
        "rows": rows,
        "notes": [*changes, *(f"{name}: {note}" for name, arm in arms.items() for note in arm.notes)],
        "trunk_runs": len(first),
        "preparatory_runs": len(prepared),
        "runs": len(asked),
        "left": len(left),
        "disk_bytes": sum(arms[run.arm].disk_bytes for run in left),
        "until": _until(study, plan, max(1, comparisons), sd),
        "total_flops": total,
        "hours": sum(map(seconds, [*first, *prepared, *asked])) / at_once / 3600,
        "hours_left": sum(map(seconds, left)) / at_once / 3600,
        "at_once": at_once,
        "speed_source": source,
        "seeds": len(study.seeds),
        "comparisons": comparisons,
        "detectable_in_sd": None if factor != factor else factor,
        "noise": sd,
        "noise_source": sd_source,
        "detectable": sd * factor if sd is not None and factor == factor else None,
    }


def _left(estimate: dict[str, Any]) -> str:
    every = sum(estimate[k] for k in ("runs", "preparatory_runs", "trunk_runs"))
    if estimate["left"] == every:
        return ""
    return (
        f"; {estimate['left']} of them still to be trained, about {duration(estimate['hours_left'] * 3600)}"
    )


def _until(study: Study, plan: Plan, comparisons: int, sd: float | None) -> dict[str, Any] | None:
    """Of a study that adds seeds: its looks, the most runs, and how wide the simultaneous sequence is expected to be."""
    if study.until is None:
        return None
    widths = stopping.expected_half_widths(study.until, comparisons)
    wanted = study.until.detectable
    return {
        "method": study.until.method,
        "looks": list(widths),
        "most_runs": len([r for r in plan.runs if r.seed in study.seeds[: study.until.seeds]]),
        "half_width_in_sd": {n: None if math.isinf(w) else w for n, w in widths.items()},
        "detectable": wanted,
        "seeds_expected": next((n for n, w in widths.items() if wanted and sd and w * sd <= wanted), None),
    }


def show(estimate: dict[str, Any], console: Console) -> None:
    """The estimate in the terminal."""
    table = Table(
        [
            Column("arm", "arm"),
            Column("protocol", "protocol"),
            Column("parameters", "parameters", ",d"),
            *active_column(estimate["rows"]),
            Column("flops_per_token", "FLOPs/token", ".3e", "training"),
            Column("tokens", "tokens", ",d"),
            Column("flops", "FLOPs", ".2e", "one run"),
            Column("time", "time", "s", "one run"),
            Column("runs", "runs", "d"),
        ],
        [
            {**row, "time": duration(row["seconds"]), "active": shown_active(row["active_parameters"])}
            for row in estimate["rows"]
        ],
    )
    console.print(table.rich())
    extra = f" and {estimate['preparatory_runs']} preparatory" if estimate["preparatory_runs"] else ""
    extra += f", {estimate['trunk_runs']} of trunks before them" if estimate["trunk_runs"] else ""
    disk = f", {format_bytes(estimate['disk_bytes'])} of disk" if estimate["disk_bytes"] else ""
    lines = [
        *estimate["notes"],
        f"{estimate['runs']} runs{' up to the next look' if estimate['until'] else ''}{extra}, {estimate['total_flops']:.2e} training FLOPs, about "
        f"{duration(estimate['hours'] * 3600)} on this device ({estimate['speed_source']})"
        + _left(estimate)
        + disk,
        _showable(estimate),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _showable(estimate: dict[str, Any]) -> str:
    if estimate["until"]:
        return _showable_in_rounds(estimate)
    if estimate["detectable_in_sd"] is None:
        return "with one seed no interval can be given: take two seeds or more"
    start = (
        f"{estimate['seeds']} seeds and {estimate['comparisons']} comparisons (Holm) show, with probability 0.8, "
        f"a difference of {estimate['detectable_in_sd']:.2f} sd of a paired difference"
    )
    if estimate["detectable"] is None:
        return f"{start}; give --noise SD to have it in bits per byte"
    return f"{start}: {estimate['detectable']:.4f} bits per byte (sd {estimate['noise']:.4g}, {estimate['noise_source']})"


def _showable_in_rounds(estimate: dict[str, Any]) -> str:
    until, sd = estimate["until"], estimate["noise"]
    looks = until["looks"]
    last = until["half_width_in_sd"][looks[-1]]
    text = (
        f"seeds are added until one knows: looks after {', '.join(map(str, looks[:3]))}{', …' if looks[3:] else ''} seeds, "
        f"{looks[-1]} and {until['most_runs']} runs at most"
    )
    if last is None:
        return f"{text}, too few to say anything"
    if sd is None:
        return f"{text}, when a difference is known to ±{last:.2f} sd of a paired one; give --noise SD to have it in bits per byte"
    text += f", when a difference is known to ±{last * sd:.4f} bits per byte (sd {sd:.4g}, {estimate['noise_source']})"
    if until["detectable"] is None:
        return text
    when = f"after {until['seeds_expected']} seeds" if until["seeds_expected"] else "not with so many"
    return f"{text}; to ±{until['detectable']:g} {when}"


def _speeds(study: Study, folder: Path, plan: Plan, quick: bool) -> tuple[dict[str, float], int, str]:
    """Seconds that a FLOP of each arm takes in training, how many runs go at once, and where the numbers come from."""
    arms = plan.arms
    done = list(results.outcomes(folder, plan.runs).values())
    # All that needs torch is done by other processes.
    with local.pool_of([Place("counting", 1)]) as one:
        [where] = launchers.call(one, "counting", local.places, study.threads)
    where = where[: len(plan.runs)]
    if done:
        mean = sum(o.result["seconds"] / o.run.flops for o in done) / len(done)
        own = {name: [o.result["seconds"] / o.run.flops for o in done if o.run.arm == name] for name in arms}
        speeds = {name: sum(x) / len(x) if x else mean for name, x in own.items()}
        return speeds, len(where), f"measured in {len(done)} finished runs"
    applied = solve(machine.applied(study, folder), next(iter(arms.values())).shape.vocabulary)
    jobs = [] if quick else machine.jobs_of(applied)
    recipes = [applied[names[0]].timed for names in jobs]
    device = str(study.base.get("device", "auto"))
    arguments = (recipes, [len(study.seeds)] * len(jobs), device, _LIMIT)
    with local.pool_of(where) as pool:
        answers = launchers.call(pool, "steps", machine.measure, *arguments, at_most=len(where))
    ceiling = 1 / median(a["flops_per_second"] for a in answers)
    if quick:
        return dict.fromkeys(arms, ceiling), len(where), "a third of the measured matmul ceiling"
    chosen = machine.decide(jobs, answers)
    timed: dict[str, float] = {}
    for names in jobs:
        # What was timed is a stage of the first arm.
        stage = costliest(applied[names[0]].stages)
        settings = Settings(**chosen["arms"][names[0]])
        for measured in map(from_plain, chosen["timings"][names[0]]):
            if measured.settings == settings:
                timed |= dict.fromkeys(names, measured.median / (stage.batch_tokens * stage.flops_per_token))
    if not timed:
        return (
            dict.fromkeys(arms, ceiling),
            len(where),
            "a third of the matmul ceiling: steps are too long to time",
        )
    rest = sum(timed.values()) / len(timed)
    left = [name for name in arms if name not in timed]
    source = f"some steps timed on random ids, {len(where)} at once"
    if left:
        source += f"; {', '.join(left)} by FLOPs, as its steps are too long to time"
    return {name: timed.get(name, rest) for name in arms}, len(where), source


def _validation_flops(run: PlannedRun, arm: Arm, folder: Path) -> float:
    """Of the forward passes over the held-out text: a third of training's for each token."""
    evaluation = run.recipe.get("evaluation") or {}
    path = (run.recipe.get("data") or {}).get("validation")
    if path is None:
        return 0.0
    tokens = quantities.count(evaluation["tokens"], "evaluation.tokens") if evaluation.get("tokens") else 0
    if (folder / str(path) / "corpus.json").is_file():
        from entasis.data.corpus import Corpus

        there = Corpus(folder / str(path)).tokens
        tokens = min(tokens, there) if tokens else there
    steps = max(1, run.tokens // batch_tokens(run.recipe))
    every = evaluation.get("every")
    times = 1 + (steps - 1) // max(1, quantities.steps(every, steps, "evaluation.every")) if every else 1
    return times * tokens * arm.flops_per_token / 3


def _noise(study: Study, folder: Path, noise: float | None) -> tuple[float | None, str]:
    if noise is not None:
        return noise, "given"
    if study.noise is not None:
        return study.noise, "from the study file"
    if (folder / verdict.FILE).is_file():
        for part in verdict.read(folder).protocols.values():
            if part.paired_sd:
                return part.paired_sd, "from the runs finished so far"
    return None, "unknown"
