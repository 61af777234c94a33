"""The training loop: a recipe and a folder in, a trained model and its numbers out.

    entasis train tiny --output runs/tiny
    torchrun --nproc-per-node 2 -m entasis train tiny --output runs/tiny

A step reads one batch, sums the loss in fp32 over its micro-batches and ranks, checks that loss and
gradient are finite, and only then updates. A run that is killed and started again goes on from its last
whole checkpoint with the same losses, on the CPU to the bit.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from entasis import files, signals
from entasis.data.corpus import Corpus
from entasis.data.order import Order
from entasis.data.windows import Windows
from entasis.errors import Failure, Stopped, UserError
from entasis.evaluate.bits_per_byte import Score, evaluate
from entasis.model import weights
from entasis.model.initialisation import initialise
from entasis.model.transformer import Transformer
from entasis.shape import cost
from entasis.train import (
    checkpoint,
    faults,
    hardware,
    meter,
    optimizers,
    parallel,
    run_folder,
    schedule,
    sharding,
    stages,
)
from entasis.train.allocation import keep_freed_memory
from entasis.train.batches import Batch, batches
from entasis.train.compilation import compiled
from entasis.train.journal import METRICS, Journal, records
from entasis.train.recipe import Recipe
from entasis.train.run_folder import Run
from entasis.train.step_timing import micro_sequences, recomputed_layers

Reporter = Callable[[dict[str, Any]], None]
_WARMING = 5
"""Steps after a start that do not count as steady: compilation, allocation, caches."""


def train(
    recipe: Recipe, folder: str | Path, *, reporter: Reporter | None = None, resume: bool = True
) -> dict[str, Any]:
    """Trains what `recipe` describes in `folder`; returns the content of its `result.json`.

    A folder that holds the same recipe is resumed, or, when finished, answered from. `reporter` gets a
    dictionary with `event` (start, note, step, validation, checkpoint), `step`, `steps`, `tokens` and what
    belongs to the event, on the main rank only. Raises `UserError` for what cannot be used, `Failure` when
    the work fails.
    """
    folder = Path(folder)
    device = hardware.device(recipe.device)
    with parallel.group(device), contextlib.ExitStack() as held:
        run = run_folder.open_run(recipe, folder, device, held, resume=resume)
        if run.result is not None:
            for note in run.notes if reporter and parallel.is_main() else ():
                reporter({"event": "note", "text": note})  # type: ignore[misc]
            return run.result
        meter.forget_peak(device)
        loop = _Loop(run, folder, device, reporter if parallel.is_main() else None)
        try:
            with signals.requested() as loop.interrupt:
                return loop.run()
        except Failure:
            raise
        except (RuntimeError, MemoryError, OSError) as error:
            if faults.is_out_of_memory(error):
                raise faults.out_of_memory(run.recipe, loop.step + 1) from error
            if files.is_disk_full(error):
                then = f"give the same command: it goes on from {checkpoint.last_name(folder)}"
                raise files.no_space(folder, error, then=then) from error
            raise
        finally:
            loop.close()


class _Loop:
    """The state of a run under way."""

    interrupt: threading.Event

    def __init__(self, run: Run, folder: Path, device: torch.device, reporter: Reporter | None) -> None:
        recipe = run.recipe
        if recipe.sequences % parallel.world():
            raise UserError(
                f"recipe: batch.tokens {recipe.batch.tokens} is {recipe.sequences} sequences, which "
                f"{parallel.world()} processes cannot share equally"
            )
        self.recipe, self.shape, self.folder, self.device = recipe, run.shape, folder, device
        self.checkpoint = run.checkpoint
        self.environment, self.notes, self.reporter = run.environment, run.notes, reporter
        if device.type == "cpu":
            keep_freed_memory()
            # Sums split over other numbers of threads round differently.
            torch.set_num_threads(run.environment["threads"])
        self.autocast = torch.bfloat16 if recipe.precision == "bf16" else None
        self.model = Transformer(run.shape, attention=recipe.attention)  # type: ignore[arg-type]
        scheme = recipe.optimizer
        initialise(
            self.model, recipe.seed, parametrisation=scheme.parametrisation, base_width=scheme.base_width
        )
        self.micro = micro_sequences(recipe)
        self.recomputed = recomputed_layers(recipe, run.shape)
        for i in self.recomputed:
            self.model.blocks[i].recompute = True  # type: ignore[assignment]
        if recipe.parallel.kind != "ddp" and parallel.world() > 1:
            sharding.shard(self.model, recipe.parallel, device, str(recipe.precision))
        else:
            self.model.to(device)
        self.windows = Windows(Corpus(recipe.data.train), recipe.data.sequence)
        self.order = Order(len(self.windows), recipe.seed)
        self.held_out = Corpus(recipe.data.validation) if recipe.data.validation is not None else None
        self.flops_per_token = cost.flops_per_token(run.shape, recipe.data.sequence)
        self.step, self.steps = 0, recipe.total_steps
        self.journal: Journal | None = None
        self.started_at = 0
        self.score: Score | None = None

    def run(self) -> dict[str, Any]:
        whole = self.checkpoint
        state = checkpoint.state_of(whole) if whole else {"step": 0, "stage": 0}
        self.step = self.started_at = state["step"]
        if parallel.is_main():
            self.journal = Journal(self.folder, self.recipe.logging, state)
        self.report(
            "start",
            parameters=cost.parameters(self.shape),
            device=str(self.device),
            notes=self.notes,
            recomputed_layers=self.recomputed,
            auto=self.environment.get("auto"),
            **{k: self.environment[k] for k in ("precision", "compile", "attention", "distinct_layers")},
        )
        for stretch in stages.lay_out(self.recipe)[state["stage"] :]:
            learning = stages.select(self.model, stretch.stage)
            rules = optimizers.build(
                self.model, self.recipe.optimizer, learning, precision=str(self.recipe.precision)
            )
            if whole and stretch.index == state["stage"]:
                checkpoint.load(whole, self.model, rules)
            self.train_stretch(stretch, rules)
        return self.finish()

    def train_stretch(self, stretch: stages.Stretch, rules: list[torch.optim.Optimizer]) -> None:
        """Trains to the end of one stage, validating and saving on the way."""
        recipe = self.recipe
        plan = stretch.stage.schedule
        assert plan is not None, "the recipe is resolved"
        loss_of = compiled(self.model) if recipe.compile else self.model.loss
        learning = [p for p in self.model.parameters() if p.requires_grad]
        gradients = parallel.GradientSum([] if sharding.is_sharded(self.model) else learning)
        supply = batches(
            self.windows,
            self.order,
            position=self.step * recipe.sequences,
            sequences=recipe.sequences,
            steps=stretch.stop - self.step,
            device=self.device,
            document_masking=recipe.data.document_masking,
        )
        begun = time.perf_counter()
        for batch in supply:
            factor = schedule.factor(plan, self.step - stretch.start, stretch.steps)
            for rule in rules:
                for group in rule.param_groups:
                    group["lr"] = group["peak_lr"] * factor
            loss, norm, stop = self.update(batch, loss_of, rules, learning, gradients)
            self.step += 1
            record = self.record(
                loss, norm, recipe.optimizer.lr * factor, batch.waited, time.perf_counter() - begun
            )
            if _due(recipe.evaluation.every, self.step) and self.step < self.steps:
                score = self.validate()
                if score is not None:
                    record["validation_bits_per_byte"] = score.bits_per_byte
            if self.journal:
                self.journal.write(record)
            self.report("step", **record)
            last = self.step == stretch.stop
            if stop or last or _due(recipe.checkpoint.every, self.step):
                self.save(stretch, rules)
            if stop and not last:
                raise Stopped(
                    f"stopped at step {self.step} of {self.steps}; a checkpoint is saved, and the same "
                    f"command with --output {self.folder} goes on from there"
                )
            begun = time.perf_counter()
        gradients.close()

    def update(
        self,
        batch: Batch,
        loss_of: Callable[..., torch.Tensor],
        rules: list[torch.optim.Optimizer],
        learning: list[torch.nn.Parameter],
        gradients: parallel.GradientSum,
    ) -> tuple[float, float, bool]:
        """One optimizer step: (mean loss in nats per token, gradient norm, whether to stop after it)."""
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        tokens = self.recipe.sequences * self.recipe.data.sequence
        for i in range(0, len(batch.tokens_BT), self.micro):
            rows = slice(i, i + self.micro)
            gradients.sending = i + self.micro == len(batch.tokens_BT)
            sharding.reduce_between_copies(self.model, gradients.sending)
            ids_BT = None if batch.ids_BT is None else batch.ids_BT[rows]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast is not None):
                loss = loss_of(batch.tokens_BT[rows], batch.targets_BT[rows], document_ids_BT=ids_BT)
            (loss / tokens).backward()
            total += loss.detach()
        gradients.wait()
        norm = sharding.full(torch.nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None]))
        stop = torch.tensor(float(self.interrupt.is_set()), device=self.device)
        mean, interrupted = parallel.sum_over_ranks(torch.stack([total / tokens, stop])).tolist()
        size = norm.item()
        if not (abs(mean) < float("inf") and size < float("inf")):
            raise faults.non_finite(self.model, self.step + 1, mean, batch.tokens_BT, self.micro)
        if self.recipe.optimizer.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(learning, self.recipe.optimizer.max_grad_norm, norm)
        for rule in rules:
            rule.step()
        for rule in rules:
            rule.zero_grad(set_to_none=True)
        return mean, size, interrupted > 0

    def record(self, loss: float, norm: float, lr: float, waited: float, seconds: float) -> dict[str, Any]:
        tokens = int(self.recipe.batch.tokens)
        speed = tokens / seconds
        ceiling = self.environment["matmul_flops_per_second"]
        return {
            "step": self.step,
            "tokens": self.step * tokens,
            "loss": loss,
            "lr": lr,
            "gradient_norm": norm,
            "seconds": seconds,
            "tokens_per_second": speed,
            "mfu": meter.utilisation(speed, self.flops_per_token, ceiling, parallel.world()),
            "data_wait": waited / seconds,
            "memory_bytes": meter.peak_memory(self.device),
            "warming": self.step - self.started_at <= _WARMING,
        }

    def validate(self) -> Score | None:
        """The score of the held-out corpus, each rank doing a share of it."""
        if self.held_out is None:
            return None
        wanted = self.recipe.evaluation
        score = evaluate(
            sharding.whole(self.model),
            self.held_out,
            sequence=self.recipe.data.sequence,
            batch=self.micro,
            device=self.device,
            autocast=self.autocast,
            max_tokens=wanted.tokens,
            max_bytes=wanted.bytes,
            part=wanted.part,
            document_masking=self.recipe.data.document_masking,
            rank=parallel.rank(),
            world=parallel.world(),
            progress=lambda done, total: self.report("validating", done=done, total=total),
        )
        nll = parallel.sum_over_ranks(torch.from_numpy(score.document_nll)).numpy()
        score = Score(nll, score.document_bytes, score.document_tokens, score.document_hashes)
        self.report("validation", bits_per_byte=score.bits_per_byte, nll=score.nll_sum / score.tokens)
        return score

    def save(self, stretch: stages.Stretch, rules: list[torch.optim.Optimizer]) -> None:
        state = {
            "step": self.step,
            "stage": stretch.index,
            "position": self.step * self.recipe.sequences,
            "tokens": self.step * int(self.recipe.batch.tokens),
            "metrics": self.journal.mark() if self.journal else None,
            "provenance": {"data": self.environment["data"], "versions": self.environment["versions"]},
        }
        path = checkpoint.save(
            self.folder,
            self.step,
            self.model,
            rules,
            state,
            keep_last=self.recipe.checkpoint.keep_last,
            keep_every=self.recipe.checkpoint.keep_every,
        )
        self.report("checkpoint", path=str(path))

    def finish(self) -> dict[str, Any]:
        """Validates, writes the weights and last of all `result.json`."""
        score = self.validate()
        model = sharding.whole(self.model)
        if not parallel.is_main():
            parallel.barrier()
            return parallel.agree({})
        assert self.journal is not None, "the main rank keeps it"
        hashes: dict[str, str | None] = {METRICS: self.journal.mark()["hash"]}
        weights.save(model, self.folder)
        hashes[weights.WEIGHTS] = None  # its own metadata says
        if score is not None:
            path = self.folder / "validation.safetensors"
            arrays = {name: torch.from_numpy(getattr(score, name).copy()) for name in Score.ARRAYS}
            need = sum(array.nbytes for array in arrays.values())
            with files.aside(path, need=need, locked=True) as partial:
                save_file(arrays, partial)
            hashes[path.name] = files.hash_of(path)
        result = {**self.result(score), "files": hashes}
        result = files.write_json(self.folder / run_folder.RESULT, result, locked=True)
        parallel.barrier()
        return parallel.agree(result)

    def result(self, score: Score | None) -> dict[str, Any]:
        rows = records(self.folder)
        speed = meter.steady(rows, "tokens_per_second")
        validation = None
        if score is not None:
            validation = {
                "bits_per_byte": score.bits_per_byte,
                "nll": score.nll_sum,
                "bytes": score.bytes,
                "tokens": score.tokens,
                "documents": len(score.document_nll),
                "perplexity": score.perplexity,
            }
        return {
            "parameters": cost.parameters(self.shape),
            "flops_per_token": self.flops_per_token,
            "tokens": self.steps * int(self.recipe.batch.tokens),
            "steps": self.steps,
            "validation": validation,
            "loss": sum(row["loss"] for row in rows[-10:]) / len(rows[-10:]),
            "seconds": sum(row["seconds"] for row in rows),
            "tokens_per_second": speed,
            "mfu": meter.steady(rows, "mfu"),
            "data_wait": meter.steady(rows, "data_wait"),
            "peak_memory_bytes": max(row["memory_bytes"] for row in rows),
            "seed": self.recipe.seed,
            **{
                k: self.environment[k]
                for k in ("device", "precision", "compile", "attention", "versions", "data")
            },
        }

    def report(self, event: str, **what: Any) -> None:
        if self.reporter:
            place = {
                "step": self.step,
                "steps": self.steps,
                "tokens": self.step * int(self.recipe.batch.tokens),
            }
            if "seconds" in what:
                what["eta_seconds"] = what["seconds"] * (self.steps - self.step)
            self.reporter({"event": event, **place, **what})

    def close(self) -> None:
        if self.journal:
            self.journal.close()


def _due(every: int | str | None, step: int) -> bool:
    return every is not None and step % int(every) == 0
