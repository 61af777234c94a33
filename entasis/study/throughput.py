"""How fast each arm trains, for comparisons at equal device time: measured in turns, with its spread.

All arms step in turn, round after round, on random ids, in as many worker processes at once as runs will be; other work
on the machine so slows all alike. What is left as the error of an arm's speed against the baseline's makes its runs too
long or too short, and is converted into bits per byte by the measured slope of its loss over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entasis import quantities
from entasis.errors import Damaged
from entasis.files import write_json
from entasis.study import machine, results
from entasis.study.arms import Arm
from entasis.study.config import Study
from entasis.study.executors import launchers
from entasis.study.executors.launchers import Pool
from entasis.study.results import Outcome
from entasis.study.statistics import CONFIDENCE

FILE = "throughput.json"
ROUNDS = 9
STEPS = 3
"""Timed steps of an arm in a round."""


def measure(study: Study, folder: Path, arms: Mapping[str, Arm], pool: Pool) -> None:
    """Writes `throughput.json`: tokens per second of each arm, in every round of every worker.

    Raises `Damaged` where it was lost: runs that are there were as long as it said.
    """
    if any(folder.glob("runs/*/*/result.json")):
        raise Damaged(f"damaged: {folder / FILE} is missing; the runs that are there are as long as it said")
    jobs = machine.jobs_of({name: arms[name] for name in study.arms})
    arguments = ([arms[names[0]].timed for names in jobs], str(study.base.get("device", "auto")))
    at_most = len(study.arms) * len(study.seeds)
    workers = launchers.call(pool, "throughput", in_turn, *arguments, at_most=at_most)
    # Arms that are the same work have the same speed, not two measurements of it.
    told = {name: [worker[i] for worker in workers] for i, names in enumerate(jobs) for name in names}
    write_json(folder / FILE, {"rounds": ROUNDS, "tokens_per_second": told})


def in_turn(plain: Sequence[Mapping[str, Any]], device: str) -> list[list[float]]:
    """In a worker: tokens per second of each recipe in each round."""
    from entasis.shape import cost
    from entasis.train import device as devices
    from entasis.train import recipe
    from entasis.train.auto_settings import settings_of, simplest
    from entasis.train.resolve import resolve
    from entasis.train.step_timing import Step, Timing

    devices.set_threads()
    found = devices.choose_device(device)
    resolved = [resolve(recipe.from_dict(p), p["shape"]["vocabulary"])[:2] for p in plain]
    ready = [(simplest(r, found), shape) for r, shape in resolved]
    states = [cost.training_memory(shape) for _, shape in ready]
    state = sum(m.weights + m.gradients + m.optimizer for m in states)
    # Kept between rounds where all of them fit, made anew for each round otherwise.
    keep = state < (devices.free_memory(found)) / 4
    held: dict[int, Step] = {}
    speeds: list[list[float]] = [[] for _ in ready]
    for i in range(ROUNDS):
        for j in range(len(ready)) if i % 2 == 0 else reversed(range(len(ready))):
            wanted, shape = ready[j]
            settings = settings_of(wanted)
            step = held.pop(j, None)
            if step is None:
                step = Step(wanted, shape, found)
                step(settings)
            timing = Timing(step(settings), [step(settings) for _ in range(STEPS)])
            speeds[j].append(wanted.batch.tokens / timing.median(wanted.sequences / step.micro))
            if keep:
                held[j] = step
            else:
                step.close()
    for step in held.values():
        step.close()
    return speeds


def rounds(folder: Path) -> dict[str, NDArray[np.float64]]:
    """Tokens per second of each arm, [rounds of all workers]; of an older folder the one measurement it made."""
    if (folder / FILE).is_file():
        told = results.json_of(folder / FILE)["tokens_per_second"]
        return {
            name: np.concatenate([np.asarray(w, dtype=float) for w in rows]) for name, rows in told.items()
        }
    before = {path.parent.name: results.json_of(path) for path in folder.glob("throughput/*/result.json")}
    return {name: np.array([float(result["tokens_per_second"])]) for name, result in before.items()}


def speeds(folder: Path) -> dict[str, float]:
    """Tokens per second of each arm: the geometric mean over rounds, so that ratios are means of ratios."""
    return {name: float(np.exp(np.log(x).mean())) for name, x in rounds(folder).items()}


def relative_error(arm: NDArray[np.float64], baseline: NDArray[np.float64]) -> float:
    """Half the 95 % interval of the logarithm of arm's speed over the baseline's; NaN from one round."""
    from scipy import stats

    log_ratio = np.log(arm / baseline)
    if log_ratio.size < 2:
        return math.nan
    error = float(log_ratio.std(ddof=1)) / math.sqrt(log_ratio.size)
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, log_ratio.size - 1)) * error


def slope(done: Iterable[Outcome]) -> float:
    """Bits per byte that an arm gains by e times as many tokens: the upper 95 % bound of its measured size.

    From the training loss over the logarithm of tokens, in the second half of the steps before the learning rate decays
    (of all steps, where the schedule has no such part). NaN where there are fewer than ten steps.
    """
    from scipy import stats

    found = []
    for o in done:
        metrics, validation = o.metrics(), o.result["validation"]
        stop = len(metrics) - _decaying(o)
        rows = metrics[stop // 2 : stop]
        if len(rows) < 10:
            continue
        fit = stats.linregress(np.log([m["tokens"] for m in rows]), [m["loss"] for m in rows])
        per_byte = validation["tokens"] / (validation["bytes"] * math.log(2))
        found.append((abs(fit.slope) + stats.norm.ppf(0.5 + CONFIDENCE / 2) * fit.stderr) * per_byte)
    return float(np.mean(found)) if found else math.nan


def error(folder: Path, arm: str, baseline: str, done: Sequence[Outcome]) -> dict[str, Any]:
    """What is known of an arm's speed, and what its error is worth: `bits_per_byte`, half a 95 % interval."""
    measured = rounds(folder)
    own, base = measured[arm], measured[baseline]
    relative, gain = relative_error(own, base), slope(done)
    return {
        "tokens_per_second": float(np.exp(np.log(own).mean())),
        "slowest": float(own.min()),
        "fastest": float(own.max()),
        "rounds": int(own.size),
        "relative_error": relative,
        "slope": gain,
        "bits_per_byte": relative * gain,
    }


def _decaying(o: Outcome) -> int:
    from entasis.train import recipe

    schedule = {
        **recipe.Schedule().model_dump(),
        **(o.run.recipe.get("schedule") or {}),
    }
    steps = int(o.result["steps"])
    return (
        quantities.steps(schedule["decay"], steps, "schedule.decay")
        if schedule["name"] == "warmup-stable-decay"
        else 0
    )
