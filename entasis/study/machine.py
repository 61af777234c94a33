"""What a study leaves to the machine, settled once for all its runs and kept in `machine.json`.

Runs are compared, so none may differ by a measurement's whim. Precision is one for all arms: the one in which all runs
together take the least time. Attention and compilation are chosen for each distinct shape, and serve all its seeds. The
measurement is `auto`'s own (`entasis.train.auto_settings`), made in worker processes, as many at once as runs will be.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entasis.files import write_text
from entasis.shape import cost
from entasis.study import results
from entasis.study.arms import Arm
from entasis.study.config import Study, changed
from entasis.study.executors import launchers
from entasis.study.executors.launchers import Pool
from entasis.train.candidates import MARGIN, Measured, Settings, fastest, from_plain, told

FILE = "machine.json"
KEYS = ("precision", "attention", "compile")


def settle(study: Study, folder: Path, arms: Mapping[str, Arm], pool: Pool) -> str:
    """Times what is open and writes `machine.json`; returns what was chosen, in a line for each arm.

    Where arms were settled before, only new ones are timed, in the same device and precision; one whose steps are the
    same work as another's takes its settings.
    """
    runs = len(study.seeds) * len(study.protocols)
    wanted = str(study.base.get("device", "auto"))
    before = results.json_of(folder / FILE) if (folder / FILE).is_file() else None
    jobs, fixed = jobs_of(arms), {}
    if before:
        jobs = _take_over(before, jobs)
        wanted, fixed = before["device"], {"precision": next(iter(before["arms"].values()))["precision"]}
    recipes = [arms[names[0]].timed for names in jobs]
    recipes = [changed(r, fixed) if r.get("precision", "auto") == "auto" else r for r in recipes]
    chosen: dict[str, Any] = {"arms": {}, "timings": {}}
    if jobs:
        # Where the runs will run: the machine that submits them may be another kind.
        counts = [runs * len(names) for names in jobs]
        answers = launchers.call(
            pool, "choices", measure, recipes, counts, wanted, at_most=runs * sum(map(len, jobs))
        )
        chosen = decide(jobs, answers)
    if before:
        chosen = {**before, **{k: {**before[k], **chosen[k]} for k in ("arms", "timings")}}
    write_text(folder / FILE, json.dumps(chosen, indent=1) + "\n")
    return "\n".join(
        f"{', '.join(names)}: {Settings(**{k: chosen['arms'][names[0]][k] for k in KEYS})}"
        + (f"; one step takes {told(timings)}" if (timings := chosen["timings"][names[0]]) else "")
        for names in jobs
    )


def _take_over(before: dict[str, Any], jobs: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Gives new arms the settings of others of the same work; returns the jobs that no settled arm shares."""
    left = []
    for names in jobs:
        known = next((name for name in names if name in before["arms"]), None)
        if known is None:
            left.append(names)
            continue
        for key in ("arms", "timings"):
            before[key] |= dict.fromkeys(names, before[key][known])
    return left


def settled(study: Study, folder: Path) -> bool:
    """Whether every arm and trunk has its settings."""
    if not (folder / FILE).is_file():
        return False
    chosen = results.json_of(folder / FILE)
    # A folder of an earlier version has one choice for all arms.
    return "arms" not in chosen or all(name in chosen["arms"] for name in [*study.trunks, *study.arms])


def applied(study: Study, folder: Path) -> Study:
    """The study with the choices of its `machine.json`, if it has one yet; what the study says itself stays."""
    if not (folder / FILE).is_file():
        return study
    chosen = results.json_of(folder / FILE)
    # A folder of an earlier version has one choice for all arms.
    given = {k: chosen[k] for k in ("device", *KEYS) if k in chosen and study.base.get(k, "auto") == "auto"}
    base = changed(study.base, given)

    def settled(name: str, changes: dict[str, Any]) -> dict[str, Any]:
        own = {k: v for k, v in chosen.get("arms", {}).get(name, {}).items() if _open(base, changes, k)}
        return {**changes, **own}

    return study.replaced(
        base=base,
        arms={name: settled(name, changes) for name, changes in study.arms.items()},
        trunks={name: settled(name, changes) for name, changes in study.trunks.items()},
    )


def jobs_of(arms: Mapping[str, Arm]) -> list[tuple[str, ...]]:
    """The names of the arms, those together whose steps are the same work: equal shape, batch, sequence, settings."""
    groups: dict[str, list[str]] = {}
    for name, arm in arms.items():
        parts = {
            k: arm.timed.get(k) for k in (*KEYS, "shape", "batch", "data", "activation_memory", "stages")
        }
        optimizer = (arm.recipe.get("optimizer") or {}).get("name")
        groups.setdefault(json.dumps([parts, optimizer], sort_keys=True, default=str), []).append(name)
    return [tuple(names) for names in groups.values()]


def decide(jobs: Sequence[tuple[str, ...]], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`machine.json` from what each worker measured of each job."""
    merged = [_merged([answer["jobs"][i]["timings"] for answer in answers]) for i in range(len(jobs))]
    steps = [job["steps"] for job in answers[0]["jobs"]]
    open_ = [
        (measured, n)
        for measured, n, job in zip(merged, steps, answers[0]["jobs"], strict=True)
        if job["precision_open"]
    ]
    simplest = [Settings(*job["simplest"]) for job in answers[0]["jobs"]]
    precision = _precision(open_)
    result: dict[str, Any] = {"device": answers[0]["device"], "margin": MARGIN, "arms": {}, "timings": {}}
    for i, names in enumerate(jobs):
        job = answers[0]["jobs"][i]
        taken = simplest[i]
        if job["precision_open"] and precision:
            taken = taken._replace(precision=precision)
        of = {m.settings: m.seconds(steps[i] / job["runs"]) for m in merged[i]}
        if of := {s: v for s, v in of.items() if s.precision == taken.precision}:
            taken = fastest(of)
        for name in names:
            result["arms"][name] = taken._asdict()
            result["timings"][name] = [m.plain() for m in merged[i]]
    return result


def measure(
    recipes: Sequence[Mapping[str, Any]], runs: Sequence[int], device: str, limit: float | None = None
) -> dict[str, Any]:
    """In a worker: the timings of each recipe's step; `limit` (seconds for all) in place of 5 % of the runs.

    With a limit, a recipe is left untimed whose one step would take longer than its part of it at a third of what a
    large matrix product reaches (`flops_per_second`), or whose weights and moments do not fit the free memory.
    """
    from entasis.evaluate.generation import free_memory
    from entasis.train import auto_settings, preflight, recipe
    from entasis.train import device as devices
    from entasis.train.resolve import resolve
    from entasis.train.stage_runner import micro_sequences

    devices.set_threads()
    found = devices.choose_device(device)
    speed = devices.measure_matmul_ceiling(found, _product(found)) / 3
    free = free_memory(found)
    jobs = []
    for plain, count in zip(recipes, runs, strict=True):
        resolved, shape, _ = resolve(recipe.from_dict(plain), plain["shape"]["vocabulary"])
        preflight.check_settings(resolved, found)
        base = auto_settings.simplest(resolved, found)
        open_ = any(getattr(resolved, key) == "auto" for key in KEYS)
        timed: list[Measured] = []
        share = limit / len(recipes) if limit is not None else math.inf
        stands = auto_settings.representative(base, shape)
        span = stands.span
        at_once = micro_sequences(base.batch.micro, span.sequences) * span.data.sequence
        step_flops = span.flops_per_token * at_once
        memory = cost.training_memory(span.shape)
        fits = memory.weights + memory.gradients + memory.optimizer < free and step_flops / speed < share
        if (limit is not None and fits) or (limit is None and open_):
            timed = auto_settings.measure(
                resolved, shape, found, runs=count, limit=None if limit is None else share
            )
        jobs.append(
            {
                "timings": [m.plain() for m in timed],
                "simplest": auto_settings.settings_of(base),
                "precision_open": resolved.precision == "auto",
                "steps": stands.steps * count,
                "runs": count,
            }
        )
    return {"device": found.type, "flops_per_second": speed, "jobs": jobs}


def _precision(jobs: Sequence[tuple[Sequence[Measured], float]]) -> Any:
    """The precision in which the jobs together take the least time; None where there is nothing to compare.

    A job counts where it was timed in both: one without tells nothing about the difference.
    """
    total: dict[Settings, tuple[float, float]] = {}
    for measured, steps in jobs:
        by = {p: [m for m in measured if m.settings.precision == p] for p in ("fp32", "bf16")}
        if all(by.values()):
            for p, some in by.items():
                key = Settings(p, "sdpa", False)  # type: ignore[arg-type]
                least = min(m.seconds(steps) for m in some)
                so_far = total.get(key, (0.0, 0.0))
                total[key] = (so_far[0] + least[0], so_far[1] + least[1])
    return fastest(total).precision if total else None


def _merged(workers: Sequence[Sequence[Mapping[str, Any]]]) -> list[Measured]:
    """The mean over workers of what all of them have timed: they worked beside one another, as runs will."""
    by = [{m.settings: m for m in map(from_plain, timings)} for timings in workers]
    return [
        Measured(
            settings=settings,
            fastest=statistics.mean(m[settings].fastest for m in by),
            median=statistics.mean(m[settings].median for m in by),
            compilation=statistics.mean(m[settings].compilation for m in by),
            rounds=min(m[settings].rounds for m in by),
        )
        for settings in by[0]
        if all(settings in m for m in by)
    ]


def _open(base: Mapping[str, Any], changes: Mapping[str, Any], key: str) -> bool:
    return changes.get(key, base.get(key, "auto")) == "auto"


def _product(device: Any) -> str:
    """The precision of the faster large matrix product."""
    from entasis.train import device as devices

    return "bf16" if devices.bf16_product_is_faster(device) else "fp32"
