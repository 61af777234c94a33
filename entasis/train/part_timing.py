"""A model's training step part by part: one micro-batch forward and back, each part timed alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from entasis.data.corpus import Corpus
from entasis.data.dataset import TokenDataset
from entasis.model.attention import attention_mask
from entasis.model.transformer import Transformer
from entasis.shape import cost, layout
from entasis.train.compilation import compile_parts
from entasis.train.resolved_recipe import SettledRecipe
from entasis.train.stage_runner import StageRunner, micro_sequences
from entasis.train.stages import StageSpan

Reporter = Callable[[str, int, int], None]
"""Told what is being measured, how much of it is done, and of how much."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the model: seconds for one micro-batch, and shares of the whole step's time and FLOPs.

    With many logits the loss makes its gradients as it goes, so that their time stands under `forward`.
    """

    name: str
    forward: float
    backward: float
    time: float
    """Share of the time of all parts, the optimizer's included; accumulation is taken into account."""
    flops: float
    """The cost model's share."""


def time_parts(
    recipe: SettledRecipe,
    span: StageSpan,
    corpus: Corpus,
    device: torch.device,
    repeats: int,
    say: Reporter,
) -> tuple[list[Part], float]:
    """Each part's share of a step of the recipe's first stage, and the seconds of the first eager step."""
    runner = StageRunner(span, recipe.replaced(compile=False), device)
    model = runner.model
    dataset = TokenDataset(corpus, span.data.sequence)
    micro = micro_sequences(recipe.batch.micro, span.sequences)
    chosen = torch.arange(micro).numpy() % len(dataset)
    rows = torch.from_numpy(dataset.batch(chosen)).to(device)
    ids_BT = None
    if recipe.data.document_masking:
        ids_BT = torch.from_numpy(dataset.document_ids(chosen)).to(device)[:, :-1]
    walk = Walk(
        model, rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), ids_BT, recipe.precision == "bf16"
    )
    rounds = []
    begun = time.perf_counter()
    first = 0.0
    for i in range(repeats + 1):
        times = walk.through(lambda: runner.step(runner.gradient_norm()))
        if i == 0:
            first = time.perf_counter() - begun
            if recipe.compile:
                # No cut can be made through the one graph that training compiles.
                compile_parts(model)
                walk.through(lambda: runner.step(runner.gradient_norm()))
        else:
            rounds.append(times)
        say("parts", i + 1, repeats + 1)
    median = {key: statistics.median(times[key] for times in rounds) for key in rounds[0]}
    return _table(median, span, micro), first


class Walk:
    """One micro-batch through the model, cut between its parts so that each is timed alone."""

    def __init__(
        self,
        model: Transformer,
        tokens_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        ids_BT: torch.Tensor | None,
        bf16: bool,
    ) -> None:
        self.model, self.device, self.bf16 = model, tokens_BT.device, bf16
        rotation = model.rotation(0, tokens_BT.shape[1], self.device)
        mask_BTS = attention_mask(0, tokens_BT.shape[1], ids_BT, self.device, model.attention)

        def layer(i: int) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda x_BTD: model.run_layers(x_BTD, rotation, i, i + 1, mask_BTS=mask_BTS)

        def head(x_BTD: torch.Tensor) -> torch.Tensor:
            return model.head_loss(model.norm(x_BTD), targets_BT)

        self.tokens_BT = tokens_BT
        self.parts: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"embedding": model.embed}
        self.parts |= {f"layer {i}": layer(i) for i in range(len(model.blocks))}
        self.parts["head and loss"] = head

    def through(self, update: Callable[[], None]) -> dict[tuple[str, str], float]:
        """Seconds of each (part, direction), and of the optimizer's `update`."""
        times: dict[tuple[str, str], float] = {}
        inputs: dict[str, torch.Tensor] = {}
        outputs: dict[str, torch.Tensor] = {}
        x = self.tokens_BT
        for name, part in self.parts.items():
            # Below what learns nothing goes back.
            x = x.detach().requires_grad_(x.requires_grad)
            inputs[name] = x
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                times[name, "forward"], x = self.timed(functools.partial(part, x))
            outputs[name] = x
        grad: torch.Tensor | None = torch.full_like(x, 1 / self.tokens_BT.numel())
        for name in reversed(self.parts):
            y, dy = outputs.pop(name), grad
            if y.requires_grad:
                times[name, "backward"], _ = self.timed(functools.partial(y.backward, dy))
            else:
                times[name, "backward"] = 0.0
            grad = inputs.pop(name).grad
        times["optimizer", "forward"], _ = self.timed(update)
        return times

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        self.wait()
        begun = time.perf_counter()
        result = work()
        self.wait()
        return time.perf_counter() - begun, result

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _flops(span: StageSpan) -> dict[str, int]:
    """The cost model's FLOPs per token of each part that has any, as this stage trains it."""
    outer = layout.outer_parameters(span.shape)
    norms = [p.name for p in outer if p.part == "final_norm"]

    def lowest(n: int) -> int:
        """Of the model's lowest `n` layers below a head that gradients pass in any case."""
        shape = dataclasses.replace(span.shape, layers=span.shape.layers[:n])
        return cost.stage_flops_per_token(
            shape, [*span.trainable, *norms], span.data.sequence, ranks=span.ranks
        )

    costs = [lowest(n) for n in range(1, span.shape.n_layers + 1)]
    above = {f"layer {i}": b - a for i, (a, b) in enumerate(itertools.pairwise(costs), start=1)}
    head = next(p for p in outer if p.role == "head" and not p.is_bias)
    below = set(span.trainable) - {p.name for p in outer if p.part == "head"}
    products = 1 + bool(below) + ((head.shares or head.name) in span.trainable)
    loss = 2 * head.count * products
    return {"layer 0": span.flops_per_token - sum(above.values()) - loss, **above, "head and loss": loss}


def _table(times: dict[tuple[str, str], float], span: StageSpan, micro: int) -> list[Part]:
    micro_batches = span.sequences / micro
    flops = _flops(span)
    names = list(dict.fromkeys(name for name, _ in times))
    seconds = {
        name: (times[name, "forward"] + times.get((name, "backward"), 0.0))
        * (1 if name == "optimizer" else micro_batches)
        for name in names
    }
    total = sum(seconds.values())
    return [
        Part(
            name,
            times[name, "forward"],
            times.get((name, "backward"), 0.0),
            seconds[name] / total,
            flops.get(name, 0) / span.flops_per_token,
        )
        for name in names
    ]
