"""A recipe's own training step, timed: forward, backward and update of one micro-batch of random ids.

What `auto` chooses, what `entasis study plan` predicts and what equal time is taken from are all this measurement.
Candidates take turns, step by step, so that other work on the machine slows all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from entasis.model.initialisation import initialise
from entasis.model.transformer import Transformer
from entasis.shape import activations
from entasis.shape.shapes import ModelShape
from entasis.train import optimizers, parallel, sharding, stages
from entasis.train.allocation import keep_freed_memory
from entasis.train.candidates import Settings
from entasis.train.compilation import compiled
from entasis.train.recipe import Recipe

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


def micro_sequences(recipe: Recipe) -> int:
    """Sequences in one forward pass of one process (of a resolved recipe): batch.micro, or less to divide its share."""
    n = recipe.sequences // parallel.world()
    return next(d for d in range(max(1, min(n, int(recipe.batch.micro))), 0, -1) if n % d == 0)


def recomputed_layers(recipe: Recipe, shape: ModelShape) -> list[int]:
    """The layers whose forward pass runs twice, to stay within the recipe's `activation_memory`.

    Raises `UserError` where that does not suffice.
    """
    if recipe.activation_memory is None:
        return []
    return activations.to_recompute(
        shape,
        int(recipe.activation_memory),
        tokens=micro_sequences(recipe) * recipe.data.sequence,
        sequence=recipe.data.sequence,
        precision=recipe.precision,  # type: ignore[arg-type]
        attention=recipe.attention,  # type: ignore[arg-type]
    )


@dataclass(slots=True)
class _Model:
    model: Transformer
    rules: list[torch.optim.Optimizer]
    learning: list[torch.nn.Parameter]
    gradients: parallel.GradientSum
    loss_of: dict[bool, Callable[..., torch.Tensor]]
    """Eager and, once asked for, compiled."""


class Step:
    """A resolved recipe's model, optimizer and one micro-batch, to be stepped in any settings.

    Weights stay as they were drawn: the learning rate is zero. One model serves all settings, except where processes
    share it out or compile it in parts. Under `torchrun` every rank makes the same calls.
    """

    def __init__(self, recipe: Recipe, shape: ModelShape, device: torch.device) -> None:
        if device.type == "cpu":
            keep_freed_memory()  # as in the run whose steps are measured
        self.recipe, self.shape, self.device = recipe, shape, device
        self.micro = micro_sequences(recipe)
        sequence = recipe.data.sequence
        drawn = torch.randint(
            shape.vocabulary, (self.micro, sequence + 1), generator=torch.Generator().manual_seed(0)
        )
        self.tokens_BT = drawn[:, :-1].contiguous().to(device)
        self.targets_BT = drawn[:, 1:].contiguous().to(device)
        self.ids_BT = None
        if recipe.data.document_masking:
            documents = torch.arange(sequence, device=device) * 4 // sequence
            self.ids_BT = documents.expand(self.micro, sequence)
        self._models: dict[Any, _Model] = {}

    def __call__(self, settings: Settings) -> Seconds:
        """Makes one step."""
        built = self._model(settings)
        self._wait()
        parallel.barrier()
        begun = time.perf_counter()
        built.gradients.sending = True
        with self._autocast(settings):
            loss = built.loss_of[settings.compile](
                self.tokens_BT, self.targets_BT, document_ids_BT=self.ids_BT
            )
        (loss / self.targets_BT.numel()).backward()
        self._wait()
        middle = time.perf_counter()
        built.gradients.wait()
        gradients = [p.grad for p in built.learning if p.grad is not None]
        norm = sharding.full(torch.nn.utils.get_total_norm(gradients))
        norm.item()
        if self.recipe.optimizer.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(built.learning, self.recipe.optimizer.max_grad_norm, norm)
        for rule in built.rules:
            rule.step()
            rule.zero_grad(set_to_none=True)
        self._wait()
        return Seconds(middle - begun, time.perf_counter() - middle)

    @torch.no_grad()
    def forward(self, settings: Settings) -> float:
        """Seconds of one micro-batch's loss alone, eager: what validation takes."""
        built = self._model(settings._replace(compile=False))
        self._wait()
        begun = time.perf_counter()
        with self._autocast(settings):
            built.loss_of[False](self.tokens_BT, self.targets_BT, document_ids_BT=self.ids_BT)
        self._wait()
        return time.perf_counter() - begun

    def close(self) -> None:
        """Gives the memory back."""
        for built in self._models.values():
            built.gradients.close()
        if any(True in built.loss_of for built in self._models.values()):
            torch._dynamo.reset()
        self._models.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _autocast(self, settings: Settings) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bf16")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _model(self, settings: Settings) -> _Model:
        """The model, switched to what `settings` say."""
        recipe = self.recipe
        shared_out = recipe.parallel.kind != "ddp" and parallel.world() > 1
        alone = parallel.world() == 1
        key = (settings.precision if shared_out else None, None if alone else settings)
        built = self._models.get(key)
        if built is None:
            # What building draws must not reach the run that follows.
            with torch.random.fork_rng(devices=[]):
                built = self._models[key] = self._build(settings, shared_out)
        if settings.compile and True not in built.loss_of:
            built.loss_of[True] = compiled(built.model, forget=False)
        _switch(built.model, settings.attention)
        for rule in built.rules:
            if hasattr(rule, "dtype"):  # Muon orthogonalises in the precision of the run
                rule.dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        chosen = recomputed_layers(_with(recipe, settings), self.shape)
        for i, block in enumerate(built.model.blocks):
            block.recompute = i in chosen  # type: ignore[assignment]
        return built

    def _build(self, settings: Settings, shared_out: bool) -> _Model:
        recipe, scheme = self.recipe, self.recipe.optimizer
        model = Transformer(self.shape, attention=settings.attention)
        initialise(model, recipe.seed, parametrisation=scheme.parametrisation, base_width=scheme.base_width)
        if shared_out:
            sharding.shard(model, recipe.parallel, self.device, settings.precision)
        else:
            model.to(self.device)
        rules = optimizers.build(
            model, scheme, stages.select(model, recipe.stages[0]), precision=settings.precision
        )
        for rule in rules:
            for group in rule.param_groups:
                group["lr"] = 0.0
        learning = [p for p in model.parameters() if p.requires_grad]
        return _Model(
            model, rules, learning, parallel.GradientSum([] if shared_out else learning), {False: model.loss}
        )


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


def _switch(model: Transformer, attention: Any) -> None:
    model.attention = attention
    for block in model.blocks:
        if block.attention is not None:
            block.attention.implementation = attention  # type: ignore[union-attr]


def _with(recipe: Recipe, settings: Settings) -> Recipe:
    return recipe.replaced(precision=settings.precision, attention=settings.attention)
