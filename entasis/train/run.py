"""A run: a recipe and a folder in, a trained model and its numbers out.

    entasis train tiny --output runs/tiny
    torchrun --nproc-per-node 2 -m entasis train tiny --output runs/tiny

A step reads one batch, sums the loss in fp32 over its micro-batches and ranks, checks that loss and
gradient are finite, and only then updates. A run that is killed and started again goes on from its last
whole checkpoint with the same losses, on the CPU to the bit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entasis import files, signals
from entasis.data.corpus import Corpus
from entasis.data.tokenizer import load as load_tokenizer
from entasis.errors import Failure, Stopped, UserError
from entasis.grow.transitions import Init
from entasis.model import weights
from entasis.shape import cost
from entasis.train import (
    checkpoint,
    failure_diagnosis,
    frozen_outputs,
    metrics,
    moments,
    parallel,
    run_folder,
    run_result,
)
from entasis.train.allocation import keep_freed_memory
from entasis.train.dataloader import load_batches
from entasis.train.device import choose_device
from entasis.train.frozen_outputs import FrozenOutputs
from entasis.train.metrics import METRICS, MetricsWriter
from entasis.train.moments import Moments
from entasis.train.online_importance import measure_importance
from entasis.train.recipe import Recipe, Samples, held_out_of
from entasis.train.run_folder import OpenedFolder
from entasis.train.stage_runner import StageRunner, checkpointed_layers
from entasis.train.timeline import Timeline
from entasis.train.training_data import TrainingData, describe_data, planned_epochs
from entasis.train.validation import Validation

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
    device = choose_device(recipe.device)
    with parallel.group(device), contextlib.ExitStack() as held:
        opened = run_folder.open_run(recipe, folder, device, held, resume=resume)
        if opened.result is not None:
            for note in opened.notes if reporter and parallel.is_main() else ():
                reporter({"event": "note", "text": note})  # type: ignore[misc]
            return opened.result
        metrics.reset_peak_memory(device)
        run = Run(opened, folder, device, reporter if parallel.is_main() else None)
        try:
            with signals.requested() as run.interrupt:
                return run.train()
        except Failure:
            raise
        except (RuntimeError, MemoryError, OSError) as error:
            if failure_diagnosis.is_out_of_memory(error):
                raise failure_diagnosis.out_of_memory(
                    run.recipe.batch.micro, run.span.data.sequence, run.step + 1
                ) from error
            if files.is_disk_full(error):
                then = f"give the same command: it goes on from {checkpoint.last_name(folder)}"
                raise files.no_space(folder, error, then=then) from error
            if parallel.world() > 1 and run.interrupt.is_set():
                # The signal ended another process before it listened for requests, and this one waited for it.
                raise Stopped(
                    f"stopped by {run.interrupt.by}; the same command goes on from {checkpoint.last_name(folder)}"
                ) from error
            raise
        finally:
            run.close()


class Run:
    """A run under way: its folder, its place in the data, its metrics. Models belong to the stage runners."""

    interrupt: signals.Request

    def __init__(
        self, opened: OpenedFolder, folder: Path, device: torch.device, reporter: Reporter | None
    ) -> None:
        self.recipe, self.folder, self.device = opened.recipe, folder, device
        self.timeline = Timeline(opened.recipe, opened.shape, [])
        begun = checkpoint.step_of(opened.checkpoint) if opened.checkpoint else 0
        for span in self.timeline.spans:
            # A stage that has ended may have needed more than a run that goes on elsewhere may take.
            if span.stop >= begun:
                checkpointed_layers(span, opened.recipe)
        self.checkpoint = opened.checkpoint
        self.environment, self.notes, self.reporter = opened.environment, opened.notes, reporter
        if device.type == "cpu":
            keep_freed_memory()
            # Sums split over other numbers of threads round differently.
            torch.set_num_threads(opened.environment["threads"])
        held_out = held_out_of(opened.recipe.data.validation)
        self.held_out = {name: Corpus(path) for name, path in held_out.items()}
        self.step = 0
        self.positions: dict[str, int] = {}
        """Sequences read of each corpus at each length of sequence."""
        self.diagnostics: dict[str, Any] = {}
        """By stage, what its transition found out."""
        self.span = self.timeline.spans[0]
        self.metrics: MetricsWriter | None = None
        self.started_at = 0

    def train(self) -> dict[str, Any]:
        last = self.checkpoint
        state: dict[str, Any] = checkpoint.state_of(last) if last else {"step": 0, "stage": 0}
        self.step = self.started_at = state["step"]
        if last and "positions" not in state:
            raise UserError(
                f"{self.folder} was begun by an earlier version of entasis; finish it with that one, or choose another "
                "--output"
            )
        self.positions = dict(state["positions"]) if last else {}
        self.diagnostics = dict(state.get("diagnostics", {}))
        if parallel.is_main():
            self.metrics = MetricsWriter(self.folder, self.recipe.logging, state)
        if measured := state.get("measured"):
            self.timeline = Timeline(self.recipe, self.timeline.shape, measured)
        runner: StageRunner | None = None
        index = state["stage"]
        while self.has_stage(runner, index):
            span = self.span = self.timeline.spans[index]
            resumes = index == state["stage"]
            index += 1
            runner = self.begin(runner, last if resumes else None)
            if resumes:
                self.report_start(runner)
            if len(self.timeline.spans) > 1 or span.own.active_parameters is not None:
                self.report("stage", **self.timeline.describe_stage(span))
            self.train_stage(runner)
        assert runner is not None, "a recipe has a stage"
        return self.finish(runner)

    @property
    def steps(self) -> int:
        return self.timeline.steps

    def has_stage(self, runner: StageRunner | None, index: int) -> bool:
        """Whether there is a stage of this number; measures what it takes to know."""
        while index >= len(self.timeline.spans) and (wanted := self.timeline.missing):
            assert runner is not None
            done = self.span.steps * self.span.sequences
            data = TrainingData(self.span.data, self.recipe.seed, self.positions, done)
            found = measure_importance(runner, data, done, wanted)
            self.report("importance", layers=found)
            self.timeline = self.timeline.after(found)
        return index < len(self.timeline.spans)

    def begin(self, before: StageRunner | None, resumes: Path | None) -> StageRunner:
        """Builds this stage's runner, with weights of its checkpoint, of the stage before, of `start`, or initial ones."""
        span, start = self.span, self.recipe.start
        tensors: Mapping[str, torch.Tensor] | None = None
        found: Moments = {}
        if before is not None:
            if span.optimizer_state == "keep":
                found = before.moments()
            tensors = {name: p.detach() for name, p in before.gathered().named_parameters()}
            before.close()
        elif start is not None and resumes is None:
            folder = Path(start.folder)
            loaded = weights.load(folder, dtype=torch.float32)
            tensors = {name: p.detach() for name, p in loaded.named_parameters()}
            keeps = {start.optimizer_state, start.data_position or start.optimizer_state}
            if "keep" in keeps:
                there, positions = moments.load(folder)
                found = there if start.optimizer_state == "keep" else {}
                self.positions = positions if start.data_position != "reset" else {}
        if span.transition is not None and tensors is not None:
            transition, plan, shape = span.transition
            optimizer = span.optimizer
            nested = self.recipe.init == "nested"
            init = Init(self.recipe.seed, optimizer.parametrisation, optimizer.base_width, nested)
            plan = transition.settle(plan, tensors.__getitem__, shape)
            tensors = dict(transition.weights(plan, tensors.__getitem__, init))
            found = moments.resized(found, plan)
            if told := transition.diagnostics:
                self.diagnostics[str(span.index)] = told
            for line in told.get("warnings", ()):
                self.report("note", text=f"stage {span.index}: {line}")
        runner = StageRunner(span, self.recipe, self.device, tensors=tensors, loads=resumes is not None)
        if resumes is not None:
            checkpoint.load(resumes, runner.model, runner.optimizers, runner.average)
            runner.resting = checkpoint.resting(resumes)
        elif found:
            runner.take_moments(found, self.timeline.learning_again(span, found))
        return runner

    def train_stage(self, runner: StageRunner) -> None:
        """Trains to the end of one stage, validating and saving on the way."""
        span, recipe = self.span, self.recipe
        done = (self.step - span.start) * span.sequences
        data = TrainingData(span.data, recipe.seed, self.positions, done)
        supply = load_batches(
            data.mixture,
            position=done,
            sequences=span.sequences,
            steps=span.stop - self.step,
            device=self.device,
            document_masking=span.data.document_masking,
        )
        if span.own.cache_frozen:
            runner.frozen_outputs = FrozenOutputs(
                self.folder,
                windows=len(data.mixture),
                read=span.steps * span.sequences,
                sequence=span.data.sequence,
                width=span.shape.d_model,
            )
        begun = time.perf_counter()
        for batch in supply:
            lr = span.optimizer.lr * runner.lr_factor(self.step)
            loss, norm, stop = runner.update(batch, self.step, self.interrupt)
            self.step += 1
            done += span.sequences
            self.positions |= data.positions(done)
            record = self.record(loss, norm, lr, batch.waited, time.perf_counter() - begun)
            due = _due(recipe.evaluation.every, self.step) or (
                self.step == span.stop and self.timeline.plan is None
            )
            if due and self.step < self.steps and (found := self.validate(runner)):
                record |= found.metrics()
            if (samples := recipe.samples) and (_due(samples.every, self.step) or self.step == self.steps):
                record["samples"] = self.write_samples(runner, samples)
            if self.metrics:
                self.metrics.write(record)
            self.report("step", **record)
            last = self.step == span.stop
            kept = recipe.checkpoint
            if stop or last or _due(kept.every, self.step) or _due(kept.keep_every, self.step):
                self.save(runner)
            if stop and not last:
                raise Stopped(
                    f"stopped at step {self.step} of {self.steps}; a checkpoint is saved, and the same "
                    f"command with --output {self.folder} goes on from there"
                )
            begun = time.perf_counter()
        if runner.frozen_outputs is not None:
            runner.frozen_outputs.close()
        if span.own.lora is not None:
            probe = data.mixture.batch(np.array([0]))[:, :-1]
            moved = runner.check_merge(torch.from_numpy(probe).to(self.device))
            self.report("merged", moved=moved)

    def record(self, loss: float, norm: float, lr: float, waited: float, seconds: float) -> dict[str, Any]:
        span = self.span
        speed = span.batch_tokens / seconds
        ceiling = self.environment["matmul_flops_per_second"]
        return {
            "step": self.step,
            **({"stage": span.index} if len(self.timeline.spans) > 1 else {}),
            "tokens": span.tokens(self.step),
            "loss": loss,
            "lr": lr,
            "gradient_norm": norm,
            "seconds": seconds,
            "tokens_per_second": speed,
            "mfu": metrics.mfu(speed, span.flops_per_token, ceiling, parallel.world()),
            "data_wait": waited / seconds,
            "memory_bytes": metrics.peak_memory(self.device),
            "warming": self.step - self.started_at <= _WARMING,
        }

    def validate(self, runner: StageRunner) -> Validation | None:
        """The scores of the held-out corpora, None where there are none."""
        if not self.held_out:
            return None

        def progress(done: int, total: int) -> None:
            self.report("validating", done=done, total=total)

        length = self.recipe.data.sequence
        found = Validation(
            {n: runner.evaluate(c, sequence=length, progress=progress) for n, c in self.held_out.items()}
        )
        self.report("validation", **found.event())
        return found

    def write_samples(self, runner: StageRunner, samples: Samples) -> list[str]:
        """Texts that the model continues the recipe's prompts to, the prompts included."""
        tokenizer = load_tokenizer(self.folder / weights.TOKENIZER)
        prompts = [tokenizer.encode(text) or [tokenizer.end_of_text or 0] for text in samples.prompts]
        answers = runner.write(prompts, samples)
        texts = [
            text + tokenizer.continuation(prompt, answer)
            for text, prompt, answer in zip(samples.prompts, prompts, answers, strict=True)
        ]
        self.report("samples", texts=texts)
        return texts

    def save(self, runner: StageRunner) -> None:
        state = {
            "step": self.step,
            "stage": self.span.index,
            "positions": self.positions,
            "measured": self.timeline.measured,
            "diagnostics": self.diagnostics,
            "tokens": self.span.tokens(self.step),
            "metrics": self.metrics.mark() if self.metrics else None,
            "provenance": {
                "data": self.environment["data"],
                "versions": self.environment["versions"],
                "layers": self.span.provenance(),
            },
        }
        path = checkpoint.save(
            self.folder,
            self.step,
            runner.model,
            runner.optimizers,
            state,
            resting=runner.resting,
            average=runner.average,
            keep_last=self.recipe.checkpoint.keep_last,
            keep_every=self.recipe.checkpoint.keep_every,
        )
        self.report("checkpoint", path=str(path))

    def finish(self, runner: StageRunner) -> dict[str, Any]:
        """Validates, writes weights and moments, and last of all `result.json`."""
        validation = self.validate(runner)
        hashes = run_result.save_weights(self.folder, runner, self.positions)
        if not parallel.is_main():
            parallel.barrier()
            return parallel.broadcast_object({})
        assert self.metrics is not None, "the main rank keeps it"
        hashes[METRICS] = self.metrics.mark()["hash"]
        if validation is not None:
            hashes |= run_result.save_scores(self.folder, validation.overall)
        epochs = planned_epochs(self.timeline.spans, self.recipe.seed, self.positions, self.step)
        result = {
            **run_result.summarise(self.folder, self.timeline, self.environment, validation),
            "seed": self.recipe.seed,
            "epochs": epochs,
            **({"transitions": self.diagnostics} if self.diagnostics else {}),
            "files": hashes,
        }
        result = files.write_json(self.folder / run_folder.RESULT, result, locked=True)
        parallel.barrier()
        return parallel.broadcast_object(result)

    def report_start(self, runner: StageRunner) -> None:
        epochs = planned_epochs(self.timeline.spans, self.recipe.seed, self.positions, self.step)
        often = [f"{path} is read {n:.2f} times" for path, n in epochs.items() if n > 1]
        self.report(
            "start",
            parameters=cost.parameters(self.span.shape),
            device=str(self.device),
            data=describe_data(self.span.data, epochs),
            notes=[*self.notes, *often],
            checkpointed_layers=runner.checkpointed,
            auto=self.environment.get("auto"),
            **{k: self.environment[k] for k in ("precision", "compile", "attention", "distinct_layers")},
        )

    def report(self, event: str, **what: Any) -> None:
        if self.reporter:
            place = {
                "step": self.step,
                "steps": self.steps,
                "tokens": self.span.tokens(self.step),
            }
            if "seconds" in what:
                what["eta_seconds"] = what["seconds"] * self.timeline.steps_left(self.step, self.span)
            self.reporter({"event": event, **place, **what})

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()
        # Of a stage that did not end; nothing goes on with it.
        frozen_outputs.path_in(self.folder).unlink(missing_ok=True)


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
