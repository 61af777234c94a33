"""Where the time of a recipe's training step goes.

    entasis bench tiny

Two measurements, both of the real thing. The training loop itself runs some steps of the recipe in a folder that
is thrown away: tokens per second, utilisation, memory, waiting for data. Then one micro-batch goes through the
model part by part, forward and back, each part timed alone, and is set beside what the cost model says each
should take.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entasis.errors import UserError
from entasis.shape import cost
from entasis.train import auto_settings, metrics, preflight, stages
from entasis.train import device as devices
from entasis.train import recipe as recipes
from entasis.train.part_timing import Part, Reporter, time_parts
from entasis.train.recipe import Recipe
from entasis.train.resolved_recipe import SettledRecipe
from entasis.train.run import train
from entasis.train.stage_runner import micro_sequences
from entasis.train.stages import StageSpan

WARM_UP = 5
"""The steps after a start that the loop marks as warming."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """Seconds of an optimizer step, over the steps that were timed."""

    median: float
    fastest: float
    slowest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstStepSeconds:
    """Seconds of the first step, allocation and compilation included."""

    eager: float
    compiled: float | None
    """None where the recipe is not compiled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """What a recipe's training step takes on this machine; `dataclasses.asdict` of it is what `--json` prints."""

    parameters: int
    flops_per_token: int
    distinct_layers: int
    device: str
    threads: int
    versions: dict[str, str]
    precision: str
    compile: bool
    attention: str
    auto: dict[str, Any] | None
    """How the settings left to `auto` were chosen; None where there were none."""
    sequence: int
    batch_tokens: int
    micro: int
    steps: int
    """How many were timed."""
    step_seconds: StepSeconds
    tokens_per_second: float
    matmul_flops_per_second: float
    mfu: float
    busy: bool
    """Whether other work took the processor while the ceiling was measured."""
    data_wait: float
    """Share of a step spent waiting for data."""
    peak_memory_bytes: int
    state_bytes: int
    """Weights, gradients and moments, as the cost model has them."""
    first_step_seconds: FirstStepSeconds
    seconds_at_the_ceiling: float
    """What a step would take at `matmul_flops_per_second`."""
    parts: list[Part]


def bench(
    recipe: Recipe, *, steps: int = 20, repeats: int = 5, reporter: Reporter | None = None
) -> BenchResult:
    """Measures `recipe` on this machine.

    `steps` are timed after the first five; each part of the model is timed `repeats` times, medians are given.
    Raises `UserError` for a recipe that cannot be used, and under torchrun.
    """
    if not 1 <= steps <= 10_000:
        raise UserError(f"--steps is {steps}; measure 1 to 10000 steps")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("bench measures one process; for several, train and read the speed in result.json")
    say = reporter or (lambda *_: None)
    device = devices.choose_device(recipe.device)
    resolved, shape, _, corpus = preflight.resolve_with_data(recipe)
    # Chosen as for the whole run: whether compiling pays depends on its length.
    preflight.check_settings(resolved, device)
    settled, auto = auto_settings.choose(resolved, shape, device)
    span = stages.lay_out(settled, shape)[0]
    records, environment = _steps(settled, span, WARM_UP + steps, say)
    steady = [record["seconds"] for record in records[WARM_UP:]]
    parts, first_eager = time_parts(settled, span, corpus, device, repeats, say)
    tokens, flops = span.batch_tokens, span.flops_per_token
    memory = cost.training_memory(span.shape, span.trainable, ranks=span.ranks)
    speed = tokens / statistics.median(steady)
    ceiling = environment["matmul_flops_per_second"]
    return BenchResult(
        parameters=cost.parameters(span.shape),
        flops_per_token=flops,
        distinct_layers=span.shape.distinct_layers,
        device=environment["device"],
        threads=environment["threads"],
        versions=environment["versions"],
        precision=settled.precision,
        compile=settled.compile,
        attention=settled.attention,
        auto=auto,
        sequence=span.data.sequence,
        batch_tokens=tokens,
        micro=micro_sequences(settled.batch.micro, span.sequences),
        steps=steps,
        step_seconds=StepSeconds(median=statistics.median(steady), fastest=min(steady), slowest=max(steady)),
        tokens_per_second=speed,
        matmul_flops_per_second=ceiling,
        mfu=metrics.mfu(speed, flops, ceiling, world=1),
        busy=environment["busy"],
        data_wait=statistics.median(record["data_wait"] for record in records[WARM_UP:]),
        peak_memory_bytes=max(record["memory_bytes"] for record in records),
        state_bytes=memory.weights + memory.gradients + memory.optimizer,
        first_step_seconds=FirstStepSeconds(
            eager=first_eager, compiled=records[0]["seconds"] if settled.compile else None
        ),
        seconds_at_the_ceiling=tokens * flops / ceiling,
        parts=parts,
    )


class _Enough(Exception):
    """Ends the measured run before anything of it is saved."""


def _steps(
    recipe: SettledRecipe, span: StageSpan, steps: int, say: Reporter
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The first steps of a run of `recipe`: what the loop recorded of them, and the environment."""
    stage = span.own.replaced(
        tokens=(steps + 1) * span.batch_tokens,
        schedule=span.schedule.replaced(warmup=0, decay=0),
        optimizer_state=None,  # a plan's is reset, whatever its start says
    )
    measured = recipe.replaced(
        tokens=stage.tokens,
        stages=(stage,),
        training_plan=None,  # its first stage is there
        evaluation=recipe.evaluation.replaced(every=None),
        checkpoint=recipe.checkpoint.replaced(every=None),
        logging=recipes.Logging(tensorboard=False),
    )
    records: list[dict[str, Any]] = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            records.append(event)
            say("steps", len(records), steps)
            if len(records) == steps:
                raise _Enough

    with tempfile.TemporaryDirectory(prefix="entasis-bench-") as folder:
        with contextlib.suppress(_Enough):
            train(measured, Path(folder) / "run", reporter=listen)
        environment = json.loads((Path(folder) / "run/environment.json").read_text(encoding="utf-8"))
    return records, environment
