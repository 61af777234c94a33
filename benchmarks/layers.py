"""What unequal layers cost: a crown against the column of equal layers with the same FLOPs per token.

    python benchmarks/layers.py [--layers 12] [--d-model 384] [--rounding tensor-core] [--compile]

Both train in one process, a step of one after a step of the other; medians of each, and of the ratio within the
pairs. The ratio is of FLOPs done per second, so that the last per mille by which the two budgets miss each other
does not count. With --compile the first steps are timed too: in a fresh process each, with an empty cache of
compiled code and then with a full one. On a machine that others use too, `--clock cpu` with OMP_NUM_THREADS=1 counts
the processor time of the one thread instead of the time on the wall.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from common import write
from steps import Stepper

from entasis.shape import cost
from entasis.shape.shapes import ModelShape
from entasis.shape.specification import resolve


def shapes(args: argparse.Namespace) -> dict[str, ModelShape]:
    """The crown, and equal layers solved to its FLOPs."""
    design = {
        "layers": args.layers,
        "d_model": args.d_model,
        "head_dim": args.head_dim,
        "vocabulary": args.vocabulary,
        "context": args.sequence,
        "tied_embeddings": True,
        "rounding": args.rounding,
    }
    crown = resolve({"profile": "crown", **design}).shape
    budget = {"flops_per_token": cost.flops_per_token(crown, args.sequence), "sequence": args.sequence}
    heads = sum(layer.n_heads for layer in crown.layers) / crown.n_layers * args.head_dim / args.d_model
    equal = {"profile": "isotropic", "head_multipliers": {"value": heads}, "budget": budget}
    return {"crown": crown, "isotropic": resolve({**equal, **design}).shape}


def main() -> None:
    """Writes and prints benchmarks/results/layers-TIME.json."""
    args = arguments()
    both = shapes(args)
    if args.first_step:
        # The first step includes building the optimizer's state and, compiled, the code.
        how = {"compile": True, "bf16": args.bf16, "attention": args.attention}
        print(json.dumps(Stepper(both[args.first_step], args.batch, args.sequence, **how).step()))
        return
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    runs = {
        name: Stepper(
            shape,
            args.batch,
            args.sequence,
            compile=args.compile,
            bf16=args.bf16,
            attention=args.attention,
            clock=clock,
        )
        for name, shape in both.items()
    }
    for run in runs.values():
        for _ in range(3):
            run.step()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(args.rounds):
        for name in list(runs) if i % 2 else reversed(list(runs)):
            seconds[name].append(runs[name].step())
    flops = {name: cost.flops_per_token(shape, args.sequence) for name, shape in both.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = args.batch * args.sequence
    pairs = [
        (iso / flops["isotropic"]) / (crown / flops["crown"])
        for crown, iso in zip(seconds["crown"], seconds["isotropic"], strict=True)
    ]
    write(
        "layers",
        ["torch"],
        settings=vars(args),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0],
        precision="bf16" if args.bf16 else "fp32",
        shapes={
            name: {
                "layers": [[x.n_heads, x.n_kv_heads, x.d_ff] for x in shape.layers],
                "distinct": shape.distinct_layers,
                "parameters": cost.parameters(shape),
                "flops_per_token": flops[name],
            }
            for name, shape in both.items()
        },
        step_seconds=medians,
        tokens_per_second={name: tokens / value for name, value in medians.items()},
        ratio_of_medians=(medians["isotropic"] / flops["isotropic"]) / (medians["crown"] / flops["crown"]),
        ratio_median_of_pairs=statistics.median(pairs),
        ratio_quartiles=statistics.quantiles(pairs, n=4)[::2],
        rounds=seconds,
        first_step_seconds=first_steps() if args.compile else None,
    )


def first_steps() -> dict[str, dict[str, float]]:
    """Seconds of the first compiled step in a fresh process, cache empty (cold) and full (warm)."""
    result: dict[str, dict[str, float]] = {}
    for name in ("crown", "isotropic"):
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                done = subprocess.run(
                    [sys.executable, *sys.argv, "--first-step", name],
                    env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                result.setdefault(name, {})[state] = json.loads(done.stdout.splitlines()[-1])
    for state in ("cold", "warm"):
        result.setdefault("crown / isotropic", {})[state] = (
            result["crown"][state] / result["isotropic"][state]
        )
    return result


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=384)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounding", default="exact")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--attention", choices=("sdpa", "plain"), default="sdpa")
    parser.add_argument("--first-step", choices=("crown", "isotropic"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
