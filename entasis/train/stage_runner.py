"""A stage runner: one stage's model, optimizers and loss. It knows nothing of the run around it.

Built in a fixed order: weights, activation checkpointing, sharding, what is trainable, optimizers, compilation.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from entasis.data.corpus import TOKENIZER, Corpus
from entasis.errors import Failure
from entasis.evaluate.bits_per_byte import Score, evaluate
from entasis.evaluate.generation import Sampling, generate
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape import activations
from entasis.train import adapters, failure_diagnosis, moments, optimizers, parallel, schedule, sharding
from entasis.train.averaging import WeightAverage
from entasis.train.compilation import compiled, eager
from entasis.train.dataloader import Batch
from entasis.train.frozen_outputs import FrozenOutputs
from entasis.train.moments import Moments
from entasis.train.recipe import Samples, mixture_of
from entasis.train.resolved_recipe import SettledRecipe
from entasis.train.stages import StageSpan


def micro_sequences(micro: int, sequences: int) -> int:
    """Sequences in one forward pass of one process: batch.micro, or less to divide its share of a step's."""
    n = sequences // parallel.world()
    return next(d for d in range(max(1, min(n, micro)), 0, -1) if n % d == 0)


def checkpointed_layers(span: StageSpan, recipe: SettledRecipe) -> list[int]:
    """The layers under activation checkpointing, to stay within the recipe's `activation_memory`.

    Raises `UserError` where that does not suffice.
    """
    if recipe.activation_memory is None:
        return []
    return activations.choose_checkpointed_layers(
        span.shape,
        recipe.activation_memory,
        tokens=micro_sequences(recipe.batch.micro, span.sequences) * span.data.sequence,
        sequence=span.data.sequence,
        precision=recipe.precision,
        attention=recipe.attention,
        first=span.first_trained,
    )


def set_trainable(model: torch.nn.Module, names: tuple[str, ...] | list[str]) -> list[torch.nn.Parameter]:
    """Lets the parameters of these names learn, and no others; returns them."""
    chosen = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [p for p in model.parameters() if p.requires_grad]


class StageRunner:
    """Trains and evaluates one model, the way one stage says."""

    def __init__(
        self,
        span: StageSpan,
        recipe: SettledRecipe,
        device: torch.device,
        *,
        tensors: Mapping[str, torch.Tensor] | None = None,
        loads: bool = False,
    ) -> None:
        """`tensors` are the weights to begin with; without them they are drawn from the recipe's seed.

        With `loads` they are left uninitialised, for a checkpoint to be loaded into.
        """
        self.span, self.device, self.recipe = span, device, recipe
        self.autocast = torch.bfloat16 if recipe.precision == "bf16" else None
        self.micro = micro_sequences(recipe.batch.micro, span.sequences)
        self.checkpointed = checkpointed_layers(span, recipe)
        self.model = self._build(tensors, loads)
        if span.own.lora is not None:
            adapters.attach(self.model, span.own.lora, list(span.adapted), recipe.seed)
        for i in self.checkpointed:
            self.model.blocks[i].activation_checkpointing = True  # type: ignore[assignment]
        if recipe.parallel.kind != "ddp" and parallel.world() > 1:
            sharding.shard(self.model, recipe.parallel, device, recipe.precision)
        else:
            self.model.to(device)
        self.trainable = set_trainable(self.model, span.trainable)
        newest = span.newest_parameters if span.warmup_new else frozenset[str]()
        self.optimizers = optimizers.build(
            self.model,
            span.optimizer,
            list(span.trainable),
            precision=recipe.precision,
            apart={name: (name in newest, span.annealed.get(name)) for name in span.trainable},
        )
        self.warming = {p for name, p in self.model.named_parameters() if name in newest}
        self.annealed = {
            p: span.own.anneal[span.annealed[name]]
            for name, p in self.model.named_parameters()
            if name in span.annealed
        }
        self.gradients = parallel.GradientSum([] if sharding.is_sharded(self.model) else self.trainable)
        self.resting: Moments = {}
        """Moments of what does not learn in this stage, for one that trains it again."""
        self.average: WeightAverage | None = None
        if recipe.average is not None:
            learning = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            self.average = WeightAverage(learning, recipe.average, stop=span.stop)
        self.frozen_outputs: FrozenOutputs | None = None
        """Set by the run where the stage has `cache_frozen`."""
        self.loss: Callable[..., torch.Tensor] = compiled(self.model) if recipe.compile else self.model.loss

    def _build(self, tensors: Mapping[str, torch.Tensor] | None, loads: bool) -> Transformer:
        recipe, shape, scheme = self.recipe, self.span.shape, self.span.optimizer
        if tensors is None:
            model = Transformer(shape, attention=recipe.attention)
            if loads:
                return model
            init_weights(
                model,
                recipe.seed,
                parametrisation=scheme.parametrisation,
                base_width=scheme.base_width,
                tokenizer=Path(next(iter(mixture_of(self.span.data.train).values())).path) / TOKENIZER,
                nested=recipe.init == "nested",
            )
            return model
        with torch.device("meta"):
            model = Transformer(shape, attention=recipe.attention)
        model.load_state_dict({name: x.detach() for name, x in tensors.items()}, assign=True)
        return model

    def update(self, batch: Batch, step: int, interrupt: threading.Event) -> tuple[float, float, bool]:
        """One optimizer step: (mean loss in nats per token, gradient norm, whether some rank was asked to stop).

        `step` counts from the start of the run. Raises `Failure` before the update where loss or gradient is not
        finite.
        """
        self._set_rates(step)
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        tokens = self.span.batch_tokens
        for i in range(0, len(batch.tokens_BT), self.micro):
            rows = slice(i, i + self.micro)
            ids_BT = None if batch.ids_BT is None else batch.ids_BT[rows]
            total += self.accumulate(
                batch.tokens_BT[rows],
                batch.targets_BT[rows],
                ids_BT,
                windows=batch.windows[rows],
                tokens=tokens,
                last=i + self.micro == len(batch.tokens_BT),
            )
        norm = self.gradient_norm()
        stop = torch.tensor(float(interrupt.is_set()), device=self.device)
        mean, interrupted = parallel.sum_over_ranks(torch.stack([total / tokens, stop])).tolist()
        size = norm.item()
        if not (abs(mean) < float("inf") and size < float("inf")):
            with self.eager():
                raise failure_diagnosis.non_finite(self.model, step + 1, mean, batch.tokens_BT, self.micro)
        self.step(norm)
        if self.average is not None:
            self.average.update(step + 1)
        return mean, size, interrupted > 0

    def accumulate(
        self,
        tokens_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        ids_BT: torch.Tensor | None,
        *,
        windows: np.ndarray | None = None,
        tokens: int,
        last: bool,
    ) -> torch.Tensor:
        """Adds the gradients of a micro-batch's loss / `tokens`; returns the summed loss.

        `windows` are the numbers of its sequences, by which `frozen_outputs` are kept. The `last` micro-batch of a step
        starts the sum of gradients over ranks.
        """
        self.gradients.sending = last
        sharding.reduce_between_copies(self.model, last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast is not None):
            if self.frozen_outputs is None or windows is None:
                loss = self.loss(tokens_BT, targets_BT, document_ids_BT=ids_BT)
            else:
                loss = self._loss_above(self.frozen_outputs, windows, tokens_BT, targets_BT, ids_BT)
        (loss / tokens).backward()
        return loss.detach()

    def _loss_above(
        self,
        kept: FrozenOutputs,
        windows: np.ndarray,
        tokens_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        ids_BT: torch.Tensor | None,
    ) -> torch.Tensor:
        """The loss from what the frozen layers made of these windows before, or now make of them."""
        first = self.span.first_trained
        x_BTD = kept.get(windows, self.device)
        if x_BTD is None:
            x_BTD = self.model.hidden_before(tokens_BT, first, document_ids_BT=ids_BT)
            kept.put(windows, x_BTD)
        return self.model.loss_from(x_BTD, first, targets_BT, document_ids_BT=ids_BT)

    def gradient_norm(self) -> torch.Tensor:
        """The norm of all gradients together, once they are summed over ranks."""
        self.gradients.wait()
        return sharding.full(
            torch.nn.utils.get_total_norm([p.grad for p in self.trainable if p.grad is not None])
        )

    def step(self, norm: torch.Tensor) -> None:
        """Clips the gradients, steps the optimizers and clears the gradients."""
        optimizers.update(
            self.trainable, self.optimizers, max_grad_norm=self.span.optimizer.max_grad_norm, norm=norm
        )

    def lr_factor(self, step: int) -> float:
        """The schedule's factor on the peak learning rate at `step`."""
        span = self.span
        begin, end = span.own.schedule_part or (0.0, 1.0)
        # A part of a longer schedule: the steps that all of it would have at this stage's pace.
        steps = round(span.steps / (end - begin), 6)
        return schedule.factor(span.schedule, begin * steps + step - span.start, steps)

    def _set_rates(self, step: int) -> None:
        factor, done = self.lr_factor(step), step - self.span.start + 1
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                # All of a group's parameters are alike in this: they were put apart.
                first = group["params"][0]
                group["lr"] = group["initial_lr"] * factor
                if done < self.span.warmup_new and first in self.warming:
                    group["lr"] *= done / self.span.warmup_new
                if own := self.annealed.get(first):
                    group["lr"] *= schedule.anneal((done - 1) / self.span.steps, own.part, own.scale)

    def evaluate(
        self, corpus: Corpus, *, sequence: int, progress: Callable[[int, int], None] | None = None
    ) -> Score:
        """The score of a held-out corpus, each rank doing a share of it."""
        wanted = self.recipe.evaluation
        with self.averaged(), self.eager():
            score = evaluate(
                self.gathered(),
                corpus,
                sequence=sequence,
                batch=self.micro,
                device=self.device,
                autocast=self.autocast,
                max_tokens=wanted.tokens,
                max_bytes=wanted.bytes,
                part=wanted.part,
                document_masking=self.recipe.data.document_masking,
                rank=parallel.rank(),
                world=parallel.world(),
                progress=progress,
            )
        nll = parallel.sum_over_ranks(torch.from_numpy(score.document_nll)).numpy()
        return Score(nll, score.document_bytes, score.document_tokens, score.document_hashes)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model holds the averaged weights, where the recipe asks for them."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    def eager(self) -> contextlib.AbstractContextManager[object]:
        """Within it the model runs eagerly: whatever is no training step has batches of other sizes, and compiles nothing."""
        return eager(self.recipe.compile)

    def write(self, prompts: Sequence[Sequence[int]], samples: Samples) -> list[list[int]]:
        """Generates a continuation of each prompt. All ranks call it."""
        answers: list[list[int]] = [[] for _ in prompts]
        sampling = Sampling(samples.temperature, seed=self.recipe.seed)
        with self.averaged(), self.eager():
            model = self.gathered()
            if parallel.is_main():
                for step in generate(model, prompts, tokens=samples.tokens, sampling=sampling):
                    for answer, token in zip(answers, step, strict=True):
                        answer.extend([] if token is None else [token])
            parallel.barrier()
        return answers

    def check_merge(self, tokens_BT: torch.Tensor) -> float:
        """How far merging LoRA's adapters moves fp32 logits, beside the largest. Raises `Failure` beyond 1e-5."""
        with self.eager():
            moved = adapters.moved(self.model, tokens_BT[:1])
        if not moved <= adapters.MOST_MOVED:
            raise Failure(
                f"merging the adapters of stage {self.span.index} moved logits by {moved:.1e} of the largest, more than "
                f"{adapters.MOST_MOVED:g}: a learning rate that is far too high is the usual cause"
            )
        return moved

    def gathered(self) -> Transformer:
        """The model with all its parameters on this process, adapters merged. All ranks call it."""
        return sharding.unsharded(self.model)

    def moments(self) -> Moments:
        """The optimizers' moments of each parameter, and those that rest. All ranks call it."""
        return {**self.resting, **moments.gather(self.model, self.optimizers)}

    def take_moments(self, found: Moments, again: Container[str]) -> None:
        """Sets the optimizers' moments; every other number of theirs stays the stage's own.

        Of what does not learn now, the moments are kept of those that learn `again`.
        """
        moments.put(self.model, self.optimizers, found)
        learning = set(self.span.trainable)
        self.resting = {name: x for name, x in found.items() if name not in learning and name in again}

    def close(self) -> None:
        """Takes the hooks off the parameters, so that the next stage's runner may have them."""
        self.gradients.close()
