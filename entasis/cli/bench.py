"""Measure a recipe on this machine: speed, memory, and where the time of a step goes.

examples:
  entasis bench tiny
  entasis bench tiny shape.profile=isotropic compile=true --steps 50 --json

Some steps of the real training run in a folder that is thrown away; then the model is timed part by part, with the
cost model's prediction beside it. Any part of the recipe can be set with key=value.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from entasis.cli import overrides
from entasis.cli.numbers import whole

if TYPE_CHECKING:
    from entasis.train.bench import BenchResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", help="a YAML file (docs/training.md lists its keys), or the name of a shipped recipe: tiny"
    )
    parser.add_argument(
        "--steps", type=whole(1, 100_000), default=20, help="steps to time, after five to warm up (20)"
    )
    parser.add_argument("--json", action="store_true")
    overrides.accept(parser)


def run(args: argparse.Namespace) -> int:
    from entasis import progress
    from entasis.train import recipe as recipes
    from entasis.train.bench import bench

    recipe = recipes.read(args.recipe, args.set)
    with progress.bars() as advance:
        figures = bench(recipe, steps=args.steps, reporter=advance)
    if args.json:
        print(json.dumps(dataclasses.asdict(figures), indent=1))
    else:
        _print(figures)
    return 0


def _print(figures: BenchResult) -> None:
    from rich.console import Console

    from entasis.report.tables import Column, Table

    columns = (
        Column("name", "part"),
        Column("forward", "forward", ",.2f", "ms"),
        Column("backward", "backward", ",.2f", "ms"),
        Column("time", "share of time", ".1%", "measured"),
        Column("flops", "share of FLOPs", ".1%", "cost model"),
    )
    rows = [
        {**dataclasses.asdict(part), "forward": 1e3 * part.forward, "backward": 1e3 * part.backward or None}
        for part in figures.parts
    ]
    step, first = figures.step_seconds, figures.first_step_seconds
    mode = "compiled" if figures.compile else "eager"
    lines = [
        f"{figures.parameters:,} parameters, {figures.distinct_layers} distinct layer shapes, "
        f"{figures.batch_tokens:,} tokens a step in sequences of {figures.sequence}",
        f"{figures.device}, {figures.threads} threads, {figures.precision}, {mode}, "
        f"{figures.attention} attention",
        f"{figures.tokens_per_second:,.0f} tokens/s: a step takes {step.median:.3f} s "
        f"({step.fastest:.3f} to {step.slowest:.3f} over {figures.steps} steps)",
        f"MFU {figures.mfu:.1%} of the measured {figures.matmul_flops_per_second / 1e9:,.0f} GFLOP/s; "
        f"at that ceiling a step would take {figures.seconds_at_the_ceiling:.3f} s"
        + (" (measured while other work took the processor: it is too low)" if figures.busy else ""),
        f"peak memory {figures.peak_memory_bytes / 1e6:,.0f} MB, of which weights, gradients and optimizer "
        f"state {figures.state_bytes / 1e6:,.0f} MB",
        f"waiting for data {figures.data_wait:.2%} of the step",
        f"first step {first.eager:.2f} s eager"
        + (f", {first.compiled:.2f} s compiled" if first.compiled is not None else ""),
    ]
    print("\n".join(lines))
    Console().print(Table(columns, rows).rich(f"one micro-batch of {figures.micro} sequences"))
