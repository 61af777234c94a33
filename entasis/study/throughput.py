"""How fast each arm trains, for comparisons at equal device time: measured in turns, with its spread.

All arms step in turn, in every different stage of their training plans, round after round, on random ids, in as many
worker processes at once as runs will be; other work on the machine so slows all alike. The remaining error of an
arm's speed relative to the baseline's makes its runs too long or too short, and is converted into bits per byte by the
measured slope of its loss over tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entasis import quantities
from entasis.errors import Damaged
from entasis.files import write_json
from entasis.shape import layout
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """An arm's measured speed; what a single round cannot give is NaN."""

    tokens_per_second: float
    """The geometric mean of the rounds."""
    slowest: float
    fastest: float
    rounds: int
    relative_error: float
    """Half the 95 % interval of the logarithm of its ratio to the baseline's."""
    slope: float
    """Bits per byte that e times as many tokens are worth."""
    bits_per_byte: float
    """What the error is worth, half a 95 % interval."""


def measure(study: Study, folder: Path, arms: Mapping[str, Arm], pool: Pool) -> None:
    """Writes `throughput.json`: tokens per second of each arm, in every round of every worker.

    Raises `Damaged` where it was lost: runs that are there were as long as it said.
    """
    if any(folder.glob("runs/*/*/result.json")):
        raise Damaged(f"damaged: {folder / FILE} is missing; the runs that are there are as long as it said")
    steps, mixes = steps_of({name: arms[name] for name in study.arms})
    device = str(study.base.get("device", "auto"))
    at_most = len(study.arms) * len(study.seeds)
    workers = launchers.call(pool, "throughput", in_turn, steps, device, at_most=at_most)
    told = {name: [mixed(worker, mix) for worker in workers] for name, mix in mixes.items()}
    write_json(folder / FILE, {"rounds": ROUNDS, "tokens_per_second": told})


Mix = Mapping[int, int]
"""Tokens that an arm trains on by each of the steps that are measured."""


def steps_of(arms: Mapping[str, Arm]) -> tuple[list[tuple[dict[str, Any], int]], dict[str, Mix]]:
    """The different steps to be measured, each a recipe and the number of its stage, and what each arm is mixed of.

    What is the same work has one speed, not two measurements of it: arms of one step, and stages of training plans in
    which the backward pass ends at one layer and as many parameters of each kind and size learn.
    """
    steps: dict[tuple[Any, ...], tuple[dict[str, Any], int]] = {}
    mixes: dict[str, Mix] = {}
    for job, names in enumerate(machine.jobs_of(arms)):
        for arm in (arms[name] for name in names):
            tokens: Counter[int] = Counter()
            # Without a plan an arm has one stage here, and a control's speed decides nothing.
            planned = arm.plan is not None and not arm.control
            for span in arm.stages if planned else arm.stages[:1]:
                learns = set(span.trainable)
                kinds = Counter((p.role, p.size) for p in layout.parameters(span.shape) if p.name in learns)
                work = (job, span.first_trained, frozenset(kinds.items()))
                steps.setdefault(work, (arm.timed, span.index))
                tokens[list(steps).index(work)] += span.steps * span.batch_tokens
            mixes[arm.name] = dict(tokens)
    return list(steps.values()), mixes


def mixed(speeds: Sequence[Sequence[float]], mix: Mix) -> list[float]:
    """Tokens per second of an arm in each round of a worker, from those of every step."""
    rounds = zip(*(speeds[i] for i in mix), strict=True)
    return [sum(mix.values()) / sum(n / s for n, s in zip(mix.values(), row, strict=True)) for row in rounds]


def in_turn(steps: Sequence[tuple[Mapping[str, Any], int]], device: str) -> list[list[float]]:
    """In a worker: tokens per second of each step, in each round."""
    from entasis.evaluate.generation import free_memory
    from entasis.shape import cost
    from entasis.train import device as devices
    from entasis.train import recipe
    from entasis.train.auto_settings import settings_of, simplest
    from entasis.train.resolve import resolve
    from entasis.train.stages import lay_out
    from entasis.train.step_timing import Step, Timing

    devices.set_threads()
    found = devices.choose_device(device)
    resolved = [(*resolve(recipe.from_dict(p), p["shape"]["vocabulary"])[:2], stage) for p, stage in steps]
    ready = [(simplest(r, found), shape, stage) for r, shape, stage in resolved]
    states = [cost.training_memory(shape) for _, shape, _ in ready]
    state = sum(m.weights + m.gradients + m.optimizer for m in states)
    # Kept between rounds where all of them fit, made anew for each round otherwise.
    keep = state < free_memory(found) / 4
    held: dict[int, Step] = {}
    speeds: list[list[float]] = [[] for _ in ready]
    for i in range(ROUNDS):
        for j in range(len(ready)) if i % 2 == 0 else reversed(range(len(ready))):
            wanted, shape, stage = ready[j]
            settings = settings_of(wanted)
            step = held.pop(j, None)
            if step is None:
                step = Step(wanted, lay_out(wanted, shape)[stage], found)
                step(settings)
            timing = Timing(step(settings), [step(settings) for _ in range(STEPS)])
            speeds[j].append(step.span.batch_tokens / timing.median(step.span.sequences / step.micro))
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


def speed(folder: Path, arm: str, baseline: str, done: Sequence[Outcome]) -> Speed:
    """What is known of an arm's speed, and what its error is worth."""
    measured = rounds(folder)
    own, base = measured[arm], measured[baseline]
    relative, gain = relative_error(own, base), slope(done)
    return Speed(
        tokens_per_second=float(np.exp(np.log(own).mean())),
        slowest=float(own.min()),
        fastest=float(own.max()),
        rounds=int(own.size),
        relative_error=relative,
        slope=gain,
        bits_per_byte=relative * gain,
    )


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
