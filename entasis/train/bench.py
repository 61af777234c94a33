"""Where the time of a recipe's training step goes.

    entasis bench tiny

Two measurements, both of the real thing. The training loop itself runs some steps of the recipe in a folder that
is thrown away: tokens per second, utilisation, memory, waiting for data. Then one micro-batch goes through the
model part by part, forward and back, each part timed alone, and is set beside what the cost model says each
should take.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from entasis.data.corpus import Corpus
from entasis.data.dataset import TokenDataset
from entasis.errors import UserError
from entasis.model.attention import attention_mask
from entasis.model.transformer import Transformer
from entasis.shape import cost
from entasis.shape.shapes import ModelShape
from entasis.train import auto_settings, metrics, optimizers, run_folder, stages
from entasis.train import device as devices
from entasis.train import recipe as recipes
from entasis.train.recipe import Recipe
from entasis.train.resolve import resolve
from entasis.train.resolved_recipe import SettledRecipe
from entasis.train.run import train
from entasis.train.stage_runner import StageRunner
from entasis.train.training_data import weighed

Reporter = Callable[[str, int, int], None]
"""Told what is being measured, how much of it is done, and of how much."""

WARM_UP = 5
"""The steps after a start that the loop marks as warming."""


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


def bench(
    recipe: Recipe, *, steps: int = 20, repeats: int = 5, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Measures `recipe` on this machine; returns plain numbers (seconds, bytes, tokens per second, shares).

    `steps` are timed after the first five; each part of the model is timed `repeats` times, medians are given.
    Raises `UserError` for a recipe that cannot be used, and under torchrun.
    """
    if not 1 <= steps <= 10_000:
        raise UserError(f"--steps is {steps}; measure 1 to 10000 steps")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("bench measures one process; for several, train and read the speed in result.json")
    say = reporter or (lambda *_: None)
    device = devices.choose_device(recipe.device)
    recipe = weighed(recipe)
    corpus = run_folder.check_data(recipe)
    resolved, shape, _ = resolve(recipe, corpus.vocabulary)
    run_folder.check_vocabulary(shape, corpus)
    # Chosen as for the whole run: whether compiling pays depends on its length.
    run_folder.check_settings(resolved, device)
    settled, auto = auto_settings.choose(resolved, shape, device)
    records, environment = _steps(settled, WARM_UP + steps, say)
    steady = [record["seconds"] for record in records[WARM_UP:]]
    parts, first_eager = _parts(settled, shape, corpus, device, repeats, say)
    tokens = settled.batch.tokens
    flops = cost.flops_per_token(shape, settled.data.sequence)
    memory = cost.training_memory(shape)
    speed = tokens / statistics.median(steady)
    ceiling = environment["matmul_flops_per_second"]
    return {
        "parameters": cost.parameters(shape),
        "flops_per_token": flops,
        "distinct_layers": shape.distinct_layers,
        "device": environment["device"],
        "threads": environment["threads"],
        "versions": environment["versions"],
        "precision": settled.precision,
        "compile": settled.compile,
        "attention": settled.attention,
        "auto": auto,
        "sequence": settled.data.sequence,
        "batch_tokens": tokens,
        "micro": settled.batch.micro,
        "steps": steps,
        "step_seconds": {
            "median": statistics.median(steady),
            "fastest": min(steady),
            "slowest": max(steady),
        },
        "tokens_per_second": speed,
        "matmul_flops_per_second": ceiling,
        "mfu": metrics.mfu(speed, flops, ceiling, world=1),
        "busy": environment["busy"],
        "data_wait": statistics.median(record["data_wait"] for record in records[WARM_UP:]),
        "peak_memory_bytes": max(record["memory_bytes"] for record in records),
        "state_bytes": memory.weights + memory.gradients + memory.optimizer,
        "first_step_seconds": {
            "eager": first_eager,
            "compiled": records[0]["seconds"] if settled.compile else None,
        },
        "seconds_at_the_ceiling": tokens * flops / ceiling,
        "parts": [dataclasses.asdict(part) for part in parts],
    }


class _Enough(Exception):
    """Ends the measured run before anything of it is saved."""


def _steps(recipe: SettledRecipe, steps: int, say: Reporter) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The first steps of a run of `recipe`: what the loop recorded of them, and the environment."""
    stage = recipe.stages[0]
    stage = stage.replaced(
        tokens=(steps + 1) * recipe.batch.tokens, schedule=stage.schedule.replaced(warmup=0, decay=0)
    )
    measured = recipe.replaced(
        tokens=stage.tokens,
        stages=(stage,),
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


def _parts(
    recipe: SettledRecipe,
    shape: ModelShape,
    corpus: Corpus,
    device: torch.device,
    repeats: int,
    say: Reporter,
) -> tuple[list[Part], float]:
    """Each part's share of a step, and the seconds of the first eager step."""
    runner = StageRunner(stages.lay_out(recipe, shape)[0], recipe.replaced(compile=False), device)
    model, rules = runner.model, runner.optimizers
    dataset = TokenDataset(corpus, recipe.data.sequence)
    micro = recipe.batch.micro
    chosen = torch.arange(micro).numpy() % len(dataset)
    rows = torch.from_numpy(dataset.batch(chosen)).to(device)
    ids_BT = None
    if recipe.data.document_masking:
        ids_BT = torch.from_numpy(dataset.document_ids(chosen)).to(device)[:, :-1]
    walk = _Walk(
        model, rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), ids_BT, recipe.precision == "bf16"
    )
    rounds = []
    begun = time.perf_counter()
    first = 0.0
    for i in range(repeats + 1):
        times = walk.through(rules)
        if i == 0:
            first = time.perf_counter() - begun
            if recipe.compile:
                walk.compile()
                walk.through(rules)
        else:
            rounds.append(times)
        say("parts", i + 1, repeats + 1)
    median = {key: statistics.median(times[key] for times in rounds) for key in rounds[0]}
    return _table(median, shape, recipe), first


class _Walk:
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

        def block(b: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda x_BTD: b(x_BTD, rotation, mask_BTS=mask_BTS)

        def head(x_BTD: torch.Tensor) -> torch.Tensor:
            return model.head_loss(model.norm(x_BTD), targets_BT)

        self.tokens_BT = tokens_BT
        self.parts: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"embedding": model.embed}
        self.parts |= {f"layer {i}": block(b) for i, b in enumerate(model.blocks)}
        self.parts["head and loss"] = head

    def compile(self) -> None:
        """Every part on its own, as no cut can be made through the one graph that training compiles."""
        torch._dynamo.reset()
        self.parts = {
            name: torch.compile(part, fullgraph=True, dynamic=False) for name, part in self.parts.items()
        }

    def through(self, rules: list[torch.optim.Optimizer]) -> dict[tuple[str, str], float]:
        """Seconds of each (part, direction), and of the optimizer."""
        times: dict[tuple[str, str], float] = {}
        inputs: dict[str, torch.Tensor] = {}
        outputs: dict[str, torch.Tensor] = {}
        x = self.tokens_BT
        # Dynamo counts recompiles by code object, which all layers share.
        with torch._dynamo.config.patch(recompile_limit=4 * len(self.parts)):
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
        times["optimizer", "forward"], _ = self.timed(lambda: self.update(rules))
        return times

    def update(self, rules: list[torch.optim.Optimizer]) -> None:
        optimizers.update(self.model.parameters(), rules, max_grad_norm=1.0)

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        self.wait()
        begun = time.perf_counter()
        result = work()
        self.wait()
        return time.perf_counter() - begun, result

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _table(times: dict[tuple[str, str], float], shape: ModelShape, recipe: SettledRecipe) -> list[Part]:
    micro_batches = recipe.sequences / recipe.batch.micro
    sequence = recipe.data.sequence
    whole = cost.flops_per_token(shape, sequence)
    flops = {f"layer {i}": cost.layer_flops_per_token(shape, i, sequence) for i in range(shape.n_layers)}
    flops["head and loss"] = whole - sum(flops.values())
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
            flops.get(name, 0.0) / whole,
        )
        for name in names
    ]
