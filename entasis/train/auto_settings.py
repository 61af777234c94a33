"""What a recipe leaves to `auto` (precision, attention, compile), chosen by timing its own step in each candidate.

Of a recipe with stages it is a step of the stage that takes most of the run's FLOPs.

Candidates take turns, their shortest steps and their medians have to agree, and a tie goes to the simpler (`entasis.train.candidates`).
Compiled steps are built and timed only where the run, by its measured eager speed, is long enough for it. The whole
choice takes at most 5 % of the expected run: what does not fit is not timed, and a run too short for any timing takes
the simplest settings.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from entasis.errors import Failure, UserError
from entasis.evaluate.generation import free_memory
from entasis.shape import activations
from entasis.shape.shapes import ModelShape
from entasis.train import device as devices
from entasis.train import failure_diagnosis, parallel
from entasis.train.candidates import MARGIN, Measured, Settings, fastest
from entasis.train.resolved_recipe import ResolvedRecipe, SettledBatch, SettledRecipe
from entasis.train.stage_runner import checkpointed_layers, micro_sequences
from entasis.train.stages import StageSpan, costliest
from entasis.train.step_timing import Step, Timing, interleave
from entasis.train.timeline import Timeline

SHARE = 0.05
"""The most of the expected run that the choice may take."""
ROUNDS = 7
"""Timed steps of each candidate, at most."""
KEYS = ("precision", "attention", "compile")


def choose(
    recipe: ResolvedRecipe, shape: ModelShape, device: torch.device
) -> tuple[SettledRecipe, dict[str, Any] | None]:
    """The recipe with `auto` settled, and the timings it was settled by (None where nothing was open).

    Every rank calls it and gets the same.
    """
    asked = [name for name in KEYS if getattr(recipe, name) == "auto"]
    base = simplest(recipe, device)
    if not asked:
        return base, None
    begun = time.perf_counter()
    measured = measure(recipe, shape, device)
    taken = settings_of(base)
    if measured:
        steps = representative(base, shape).steps
        taken = fastest({m.settings: m.seconds(steps) for m in measured})
    timings = [m.plain() for m in measured]
    told = {
        "settled": asked,
        "margin": MARGIN,
        "seconds": time.perf_counter() - begun,
        "timings": timings,
    }
    return parallel.broadcast_object((base.replaced(**taken._asdict()), told))


def simplest(recipe: ResolvedRecipe, device: torch.device) -> SettledRecipe:
    """The recipe settled without any timing: bf16 on a GPU that computes it, else fp32; sdpa; eager."""
    precision, micro = recipe.precision, recipe.batch.micro
    if precision == "auto":
        units = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if units else "fp32"
    if micro == "auto":
        # On a CPU more than this falls out of its caches: a quarter slower at twice as many tokens.
        at_once = 32_768 if device.type == "cuda" else 4_096
        longest = max(stage.sequence or recipe.data.sequence for stage in recipe.stages)
        micro = max(1, min(recipe.sequences, at_once // longest))
    return recipe.narrowed(
        SettledRecipe,
        batch=recipe.batch.narrowed(SettledBatch, micro=micro),
        device=device.type if recipe.device == "auto" else recipe.device,
        precision=precision,
        attention="sdpa" if recipe.attention == "auto" else recipe.attention,
        compile=recipe.compile is True,
    )


def settings_of(recipe: SettledRecipe) -> Settings:
    """How the recipe's step is computed."""
    return Settings(recipe.precision, recipe.attention, recipe.compile)


@dataclasses.dataclass(frozen=True, slots=True)
class Representative:
    """The stage that stands for a run."""

    span: StageSpan
    steps: float
    """So many of its steps cost the FLOPs of the whole run."""
    spans: Sequence[StageSpan]
    """All stages of the run."""

    @property
    def models(self) -> int:
        """How many different models the stages train: each is compiled anew."""
        return len({(span.shape, span.trainable) for span in self.spans})


def representative(recipe: SettledRecipe, shape: ModelShape) -> Representative:
    """The stage of a recipe that takes most of its FLOPs."""
    spans = Timeline(recipe, shape, []).guessed().spans
    span = costliest(spans)
    return Representative(span, sum(each.flops for each in spans) / span.flops * span.steps, spans)


def measure(
    recipe: ResolvedRecipe,
    shape: ModelShape,
    device: torch.device,
    *,
    runs: int = 1,
    limit: float | None = None,
) -> list[Measured]:
    """Times the candidates for what a recipe leaves open, within 5 % of `runs` such runs; empty where too short.

    With a `limit` in seconds in place of the 5 %, at least one candidate is timed, and none is compiled that the
    recipe does not want compiled. Every rank calls it.
    """

    begun = time.perf_counter()
    base = simplest(recipe, device)
    stands = representative(base, shape)
    sequences = stands.span.sequences
    per_step = sequences / parallel.world() / micro_sequences(base.batch.micro, sequences)
    steps = stands.steps * runs
    eager = _eager(recipe, base, stands.spans, device)
    if limit is None:
        # A candidate costs a step to warm up, one that counts, and building the model.
        eager = eager[: int(SHARE * steps * per_step / 3)]
        if len(eager) < (1 if recipe.compile == "auto" else 2):
            return []
    step = Step(base, stands.span, device)
    try:
        timings: dict[Settings, Timing] = {}
        _try(step, eager[0], timings)

        def time_for(seconds: float) -> bool:
            # The first step is slower than those of the run: what is expected falls as more is known.
            run = steps * min(timing.fastest(per_step) for timing in timings.values())
            budget = SHARE * run if limit is None else limit
            return parallel.broadcast_object(time.perf_counter() - begun + seconds < budget)

        for settings in eager[1:]:
            # Its first step and one more of each.
            if time_for((2 + len(timings)) * sum(next(iter(timings.values())).first)):
                _try(step, settings, timings)
        timed = _timed(step, timings, per_step, time_for)
        if limit is None and recipe.compile is not False and devices.has_compiler(device):
            budget = SHARE * steps * min(m.fastest for m in timed)
            left = budget - (time.perf_counter() - begun)
            timed += _compiled(step, timed, per_step, left, stands.models, recipe.compile is True)
        if recipe.compile is not True:
            return timed
        # Where there was no time to build each of them, the eager steps say which to build.
        return [m for m in timed if m.settings.compile] or [
            dataclasses.replace(m, settings=m.settings._replace(compile=True)) for m in timed
        ]
    finally:
        step.close()


def compilation_seconds(shape: ModelShape) -> float:
    """An upper estimate of the seconds that compiling takes, used before it has been tried."""
    return 30.0 + 10.0 * shape.distinct_layers


def _eager(
    recipe: ResolvedRecipe, base: SettledRecipe, spans: Sequence[StageSpan], device: torch.device
) -> list[Settings]:
    """What may be chosen among, simplest first and precision before attention, all eager."""
    start = settings_of(base)._replace(compile=False)
    result = [start]
    if recipe.precision == "auto":
        # Where the processor only emulates bf16 its step can take a hundred times as long: not to be tried.
        contender = device.type == "cuda" or parallel.broadcast_object(devices.bf16_product_is_faster(device))
        if contender:
            result.append(start._replace(precision="fp32" if start.precision == "bf16" else "bf16"))
    if recipe.attention == "auto":
        result += [
            s._replace(attention="plain")
            for s in result
            if all(_fits(base, span, device, s.precision) for span in spans)
        ]
    return result


def _fits(
    base: SettledRecipe, span: StageSpan, device: torch.device, precision: Literal["fp32", "bf16"]
) -> bool:
    """Whether what plain attention keeps (T × T for every head) fits half of the memory that is free."""
    plain = base.replaced(precision=precision, attention="plain")
    try:
        checkpointed = checkpointed_layers(span, plain)
    except UserError:
        return False
    shape, sequence = span.shape, span.data.sequence
    layers = [
        activations.layer_bytes_per_token(shape, i, sequence, precision=precision, attention="plain")
        for i in range(shape.n_layers)
    ]
    needed = activations.peak_bytes_per_token(layers, checkpointed, shape.d_model)
    free = parallel.broadcast_object(free_memory(device))
    return needed * micro_sequences(base.batch.micro, span.sequences) * sequence < free / 2


def _try(step: Step, settings: Settings, timings: dict[Settings, Timing]) -> None:
    """Makes a candidate's first step; of several, one that runs out of memory is none.

    Raises `Failure` where memory does not suffice for the first.
    """
    try:
        timings[settings] = Timing(step(settings))
    except RuntimeError as error:
        if not failure_diagnosis.is_out_of_memory(error):
            raise
        if not timings or parallel.world() > 1:
            raise failure_diagnosis.out_of_memory(step.micro, step.span.data.sequence, 0) from error


def _timed(
    step: Step,
    timings: dict[Settings, Timing],
    per_step: float,
    time_for: Callable[[float], bool],
    models: int = 1,
) -> list[Measured]:
    calls = {s: functools.partial(step, s) for s in timings}
    interleave(calls, timings, rounds=ROUNDS, time_for=time_for)
    return [
        Measured(
            settings=settings,
            fastest=timing.fastest(per_step),
            median=timing.median(per_step),
            compilation=timing.first.micro * models if settings.compile else 0.0,
            rounds=len(timing.steps),
        )
        for settings, timing in timings.items()
    ]


def _compiled(
    step: Step, eager: list[Measured], per_step: float, budget: float, models: int, forced: bool
) -> list[Measured]:
    """The fastest eager candidates compiled, as many as the seconds left suffice for; the run has to be compiled if
    `forced`, and then it is all of them or none."""
    begun = time.perf_counter()
    room = parallel.broadcast_object(int(budget / compilation_seconds(step.span.shape)))
    chosen = sorted(eager, key=lambda m: m.fastest)[: max(0, room)]
    if not chosen or (forced and len(chosen) < len(eager)):
        return []
    limit = 8 * len(chosen) * max(1, step.span.shape.distinct_layers)
    with torch._dynamo.config.patch(recompile_limit=limit):
        torch._dynamo.reset()
        timings: dict[Settings, Timing] = {}
        for m in chosen:
            try:
                _try(step, m.settings._replace(compile=True), timings)
            except (RuntimeError, Failure):
                # Nobody asked for compiled code: where it cannot be built, or held in memory, it is no candidate.
                if forced or parallel.world() > 1:
                    raise
        if not timings:
            return []

        def time_for(seconds: float) -> bool:
            return parallel.broadcast_object(time.perf_counter() - begun + seconds < budget)

        return _timed(step, timings, per_step, time_for, models)
