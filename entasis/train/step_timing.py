"""A recipe's own training step, timed: forward, backward and update of one micro-batch of random ids.

What `auto` chooses, what `entasis study plan` predicts and what equal time is taken from are all this measurement.
Candidates take turns, step by step, so that other work on the machine slows all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch

from entasis.model.transformer import Transformer
from entasis.shape.interfaces import Glyph, Random
from entasis.train import parallel
from entasis.train.allocation import keep_freed_memory
from entasis.train.candidates import Settings
from entasis.train.compilation import compiled, eager
from entasis.train.resolved_recipe import SettledRecipe
from entasis.train.stage_runner import StageRunner, checkpointed_layers, micro_sequences
from entasis.train.stages import StageSpan

K = TypeVar("K")


class Seconds(NamedTuple):
    """One timed step: forward and backward of a micro-batch, then clipping and update."""

    micro: float
    update: float


@dataclass(slots=True)
class Timing:
    """The steps timed in one setting, the first (allocation, compilation) apart."""

    first: Seconds
    steps: list[Seconds] = field(default_factory=list)

    def fastest(self, micro_batches: float) -> float:
        """Seconds of an optimizer step of so many micro-batches. Other work on the machine only adds to it."""
        steps = self.steps or [self.first]
        return micro_batches * min(s.micro for s in steps) + min(s.update for s in steps)

    def median(self, micro_batches: float) -> float:
        """The same from medians: what a run on a machine as busy as this will take."""
        micro = statistics.median(s.micro for s in self.steps)
        return micro_batches * micro + statistics.median(s.update for s in self.steps)


class Step:
    """A model as a stage of a recipe trains it, and one micro-batch, to be stepped in any settings.

    Weights stay as they were drawn: the learning rate is zero. One model serves all settings, but a sharded
    one has its precision built in. Under `torchrun` every rank makes the same calls.
    """

    def __init__(self, recipe: SettledRecipe, span: StageSpan, device: torch.device) -> None:
        if device.type == "cpu":
            keep_freed_memory()  # as in the run whose steps are measured
        self.recipe, self.device = recipe, device
        if isinstance(span.shape.interface, Glyph):
            # Its table is drawn from the corpus's tokenizer, which need not be there yet; another is as fast.
            span = replace(span, shape=replace(span.shape, interface=Random()))
        self.span = span
        self.micro = micro_sequences(recipe.batch.micro, self.span.sequences)
        sequence = self.span.data.sequence
        drawn = torch.randint(
            span.shape.vocabulary, (self.micro, sequence + 1), generator=torch.Generator().manual_seed(0)
        )
        self.tokens_BT = drawn[:, :-1].contiguous().to(device)
        self.targets_BT = drawn[:, 1:].contiguous().to(device)
        self.ids_BT = None
        if recipe.data.document_masking:
            documents = torch.arange(sequence, device=device) * 4 // sequence
            self.ids_BT = documents.expand(self.micro, sequence)
        self._runners: dict[str | None, StageRunner] = {}
        self._compiled: dict[str | None, Callable[..., torch.Tensor]] = {}

    def __call__(self, settings: Settings) -> Seconds:
        """Makes one step."""
        runner = self._runner(settings)
        self._wait()
        parallel.barrier()
        begun = time.perf_counter()
        with eager(not settings.compile):
            runner.accumulate(
                self.tokens_BT, self.targets_BT, self.ids_BT, tokens=self.targets_BT.numel(), last=True
            )
        self._wait()
        middle = time.perf_counter()
        norm = runner.gradient_norm()
        norm.item()
        runner.step(norm)
        self._wait()
        return Seconds(middle - begun, time.perf_counter() - middle)

    @torch.no_grad()
    def forward(self, settings: Settings) -> float:
        """Seconds of one micro-batch's loss alone, eager: what validation takes."""
        runner = self._runner(settings._replace(compile=False))
        self._wait()
        begun = time.perf_counter()
        with eager(), torch.autocast(self.device.type, torch.bfloat16, enabled=runner.autocast is not None):
            runner.loss(self.tokens_BT, self.targets_BT, document_ids_BT=self.ids_BT)
        self._wait()
        return time.perf_counter() - begun

    def close(self) -> None:
        """Gives the memory back."""
        for runner in self._runners.values():
            runner.close()
        if self._compiled:
            torch._dynamo.reset()
        self._runners.clear()
        self._compiled.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _runner(self, settings: Settings) -> StageRunner:
        """The stage's runner, switched to what `settings` say."""
        shared_out = self.recipe.parallel.kind != "ddp" and parallel.world() > 1
        key = settings.precision if shared_out else None
        wanted = self.recipe.replaced(
            precision=settings.precision, attention=settings.attention, compile=False
        )
        if key not in self._runners:
            # What building draws must not reach the run that follows.
            with torch.random.fork_rng(devices=[]):
                runner = StageRunner(self.span, wanted, self.device)
            for optimizer in runner.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = 0.0
            self._runners[key] = runner
        runner = self._runners[key]
        if settings.compile and key not in self._compiled:
            self._compiled[key] = compiled(runner.model, forget=False)
        runner.loss = self._compiled[key] if settings.compile else runner.model.loss
        runner.autocast = torch.bfloat16 if settings.precision == "bf16" else None
        _switch_attention(runner.model, settings.attention)
        for optimizer in runner.optimizers:
            if hasattr(optimizer, "dtype"):  # Muon orthogonalises in the precision of the run
                optimizer.dtype = runner.autocast or torch.float32
        chosen = checkpointed_layers(self.span, wanted)
        for i, block in enumerate(runner.model.blocks):
            block.activation_checkpointing = i in chosen  # type: ignore[assignment]
        return runner


def interleave(
    steps: Mapping[K, Callable[[], Seconds]],
    timings: Mapping[K, Timing],
    *,
    rounds: int,
    time_for: Callable[[float], bool],
) -> None:
    """Adds `rounds` timed steps of each to `timings`, all in turn, forwards and backwards.

    One round is always made; before each other, `time_for(seconds)` is asked whether there is time for one that takes as
    long as the last.
    """
    order = list(steps)
    for i in range(rounds):
        begun = time.perf_counter()
        for name in order:
            timings[name].steps.append(steps[name]())
        order.reverse()
        if i + 1 < rounds and not time_for(time.perf_counter() - begun):
            break


def _switch_attention(model: Transformer, attention: Any) -> None:
    model.attention = attention
    for block in model.blocks:
        if block.attention is not None:
            block.attention.implementation = attention  # type: ignore[union-attr]
