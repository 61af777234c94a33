"""Train a model from a recipe.

example:
  entasis data prepare stdlib --train-tokenizer 4096 --output corpora/stdlib
  entasis train tiny --output runs/tiny
  entasis train tiny optimizer.lr=1e-3 shape.profile=crown --output runs/crown
  torchrun --nproc-per-node 2 -m entasis train tiny --output runs/tiny

Any part of the recipe can be set with key=value (or --key=value); lists by number, as in stages.0.tokens=2M.
The same command goes on from the last whole checkpoint, or answers from a finished run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entasis.cli import overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", help="a YAML file (docs/training.md lists its keys), or the name of a shipped recipe: tiny"
    )
    parser.add_argument("--output", metavar="FOLDER", help="the run's folder (default: runs/NAME-OF-RECIPE)")
    parser.add_argument("--print_config", action="store_true", help="show the fully resolved recipe and stop")
    parser.add_argument("--json", action="store_true", help="print result.json")
    overrides.accept(parser)


def run(args: argparse.Namespace) -> int:
    from entasis.train import recipe as recipes

    recipe = recipes.read(args.recipe, args.set)
    if args.print_config:
        from entasis.train import device as devices
        from entasis.train import run_folder
        from entasis.train.resolve import resolve

        corpus = run_folder.check_data(recipe)
        resolved, shape, _ = resolve(recipe, corpus.vocabulary)
        run_folder.check_vocabulary(shape, corpus)
        device = devices.choose_device(recipe.device)
        run_folder.check_settings(resolved, device)
        print(recipes.to_yaml(run_folder.choose(resolved, shape, device)[0]), end="")
        return 0
    from entasis.train import parallel
    from entasis.train.run import train

    folder = Path(args.output or Path("runs") / Path(args.recipe).stem)
    with _Progress() as progress:
        result = train(recipe, folder, reporter=progress)
    # Only rank 0 speaks; the process group is gone by now, its environment is not.
    if not parallel.is_main_process():
        return 0
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print(_summary(result, folder))
    return 0


def _summary(result: dict[str, Any], folder: Path) -> str:
    lines = [
        f"{result['parameters']:,} parameters, {result['tokens']:,} tokens, {result['steps']} steps, "
        f"{result['tokens_per_second']:,.0f} tokens/s, MFU {result['mfu']:.0%} of the measured ceiling",
        f"training loss {result['loss']:.4f} nats per token",
    ]
    if result["validation"]:
        lines.append(f"validation {result['validation']['bits_per_byte']:.4f} bits per byte")
    return "\n".join([*lines, f"in {folder}"])


def _chosen(auto: dict[str, Any]) -> str:
    """How what was left to `auto` was settled."""
    from entasis.train.candidates import told

    what = ", ".join(auto["settled"])
    if not auto["timings"]:
        return f"auto ({what}): the run is too short to time candidates; the simplest are taken"
    return (
        f"auto ({what}): one step takes {told(auto['timings'])}; timed in {auto['seconds']:.1f} s, within "
        f"{auto['margin']:.0%} the simpler is taken"
    )


def _told_of_stage(stage: dict[str, Any]) -> str:
    most = stage["most_active_parameters"]
    within = f" (at most {most:,})" if most is not None else ""
    return (
        f"stage {stage['stage'] + 1} of {stage['stages']}: {stage['active_parameters']:,} active parameters{within}, "
        f"{stage['frozen_parameters']:,} frozen"
    )


class _Progress:
    """A bar with ETA on a terminal, now and then a line elsewhere; on stderr, so that --json stays clean."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        return self._event

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def _event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "note":
            self._console.print(f"note: {event['text']}", soft_wrap=True, markup=False)
        elif kind == "start":
            self._start(event)
        elif kind == "stage":
            self._console.print(_told_of_stage(event), soft_wrap=True, highlight=False)
        elif kind == "merged":
            told = f"adapters merged; logits moved by {event['moved']:.1e} of the largest"
            self._console.print(told, soft_wrap=True, highlight=False)
        elif kind == "step":
            figures = f"loss {event['loss']:.4f}  {event['tokens_per_second']:,.0f} tokens/s"
            if self._bar:
                self._bar.update(self._task, completed=event["step"], figures=figures)
            elif event["step"] % max(1, event["steps"] // 10) == 0:
                print(f"step {event['step']}/{event['steps']}  {figures}", file=sys.stderr)
        elif kind == "validation":
            self._console.print(
                f"step {event['step']}: validation {event['bits_per_byte']:.4f} bits per byte"
            )

    def _start(self, event: dict[str, Any]) -> None:
        compiled = "compiled" if event["compile"] else "eager"
        self._console.print(
            f"{event['parameters']:,} parameters, {event['distinct_layers']} distinct layer shapes, "
            f"{event['device']} in {event['precision']}, {compiled}, {event['attention']} attention"
            + (f"; going on from step {event['step']}" if event["step"] else ""),
            soft_wrap=True,
        )
        if event["auto"] and not event["step"]:
            self._console.print(_chosen(event["auto"]), soft_wrap=True, highlight=False)
        if event["checkpointed_layers"]:
            layers = ", ".join(map(str, event["checkpointed_layers"]))
            self._console.print(f"activation checkpointing: layers {layers}", soft_wrap=True)
        for note in event["notes"]:
            self._console.print(f"note: {note}", soft_wrap=True, markup=False)
        if self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = ("steps", MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("", total=event["steps"], completed=event["step"], figures="")
            self._bar.start()
