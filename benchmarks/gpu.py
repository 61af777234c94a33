"""The GPU's rows of the table, in one go: speed and utilisation, unequal against equal layers, the loss's memory,
documents kept apart, first steps, a checkpoint resumed.

    python benchmarks/gpu.py              # an H200 or H100: about ten minutes
    python benchmarks/gpu.py --toy        # seconds, also on a CPU: whether the script runs

Shapes: crown-paper/baseline-18 and crown-18, 181 M parameters, T 1024, bf16, one compiled graph, and crown-18
rounded to widths that tensor cores like. Each part is written to benchmarks/results/ as it ends, so that what was
measured survives what comes after.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import write
from steps import Stepper

from entasis.shape import cost
from entasis.shape.shapes import ModelShape
from entasis.shape.specification import preset, resolve
from entasis.train import device as devices

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAPER = {
    "d_model": 768, "head_dim": 64, "layers": 18, "norm_placement": "reordered", "qk_norm": "full",
    "context": 1024, "vocabulary": 50_304,
}  # fmt: skip


def shapes(toy: bool) -> dict[str, ModelShape]:
    """The column of equal layers and those beside it; each crown has its FLOPs but for roundings."""
    if toy:
        plain = {"layers": 4, "d_model": 64, "head_dim": 16, "vocabulary": 512, "context": 64}
        named = {"baseline": resolve({"profile": "isotropic", **plain}).shape}
        budget = {"flops_per_token": cost.flops_per_token(named["baseline"], 64), "sequence": 64}
        return named | {"crown": resolve({"profile": "crown", "budget": budget, **plain}).shape}
    baseline = preset("crown-paper/baseline-18")
    budget = {"flops_per_token": cost.flops_per_token(baseline, 1024), "sequence": 1024}
    rounded = {"rounding": "tensor-core", "device": "hopper", "budget": budget, **PAPER}
    equal = {"profile": "isotropic", "head_multipliers": {"value": 0.75}}
    return {
        "baseline": baseline,
        "crown": preset("crown-paper/crown-18"),
        "baseline tensor-core": resolve({**equal, **rounded}).shape,
        "crown tensor-core": resolve({"profile": "crown", **rounded}).shape,
    }


def main() -> None:
    args = arguments()
    if args.first_step:
        run = stepper(shapes(args.toy)[args.first_step], args)
        print(json.dumps(run.step()))
        return
    for part in (speed, documents, first_steps, loss_memory, checkpoints):
        if part.__name__ in args.parts:
            begun = time.perf_counter()
            figures = part(args)
            write(
                f"gpu-{part.__name__.replace('_', '-')}",
                ["torch", "triton"],
                toy=args.toy,
                device=DEVICE,
                precision="bf16" if args.bf16 else "fp32",
                seconds_of_this_part=time.perf_counter() - begun,
                **figures,
            )


def stepper(shape: ModelShape, args: argparse.Namespace) -> Stepper:
    batch, sequence = (2, 64) if args.toy else (args.batch, 1024)
    return Stepper(shape, batch, sequence, compile=args.compile, bf16=args.bf16, device=DEVICE)


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second, MFU against the measured ceiling, and FLOPs done per second relative to equal layers."""
    device = torch.device(DEVICE)
    ceiling = devices.measure_matmul_ceiling(device, "bf16" if args.bf16 else "fp32")
    sequence = 64 if args.toy else 1024
    columns = shapes(args.toy)
    runs = {name: stepper(shape, args) for name, shape in columns.items()}
    memory: dict[str, int] = {}
    for name, run in runs.items():
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            run.step()
        memory[name] = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3 if args.toy else args.rounds):
        for name, run in runs.items():
            seconds[name].append(run.step())
    rows = {}
    for name, shape in columns.items():
        flops = cost.flops_per_token(shape, sequence)
        tokens_per_second = runs[name].tokens / statistics.median(seconds[name])
        rows[name] = {
            "parameters": cost.parameters(shape),
            "distinct_layers": shape.distinct_layers,
            "flops_per_token": flops,
            "flops_per_token_causal": cost.flops_per_token(shape, sequence, attended="causal"),
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * flops / ceiling,
            "peak_bytes_all_models_resident": memory[name],
            "step_seconds": seconds[name],
        }
    ratios = {}
    for name, row in rows.items():
        if name.startswith("crown"):
            equal = rows[name.replace("crown", "baseline")]
            work = row["tokens_per_second"] * row["flops_per_token"]
            ratios[name] = {
                "flops_per_second": work / (equal["tokens_per_second"] * equal["flops_per_token"]),
                "tokens_per_second": row["tokens_per_second"] / equal["tokens_per_second"],
            }
    return {
        "tokens_per_step": runs["baseline"].tokens,
        "compile": args.compile,
        "matmul_flops_per_second": ceiling,
        "columns": rows,
        "crown_over_baseline": ratios,
    }


def documents(args: argparse.Namespace) -> dict[str, Any]:
    """Attention that stays inside documents: FlexAttention against a mask of T × T, and against none.

    On a CPU FlexAttention has no backward pass, so there the toy compares the mask with itself.
    """
    shape = shapes(args.toy)["crown"]
    batch, sequence = (2, 64) if args.toy else (args.batch, 1024)
    long = sequence // 4
    ways = {"none": ("sdpa", 0), "mask": ("sdpa", long), "flex": ("flex", long)}
    rows = {}
    for name, (attention, average) in ways.items():
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run = Stepper(
            shape, batch, sequence, compile=args.compile and DEVICE == "cuda", bf16=args.bf16,
            attention=attention, documents=average, device=DEVICE,
        )  # fmt: skip
        first = [(run.step(), run.loss, run.norm) for _ in range(3)]
        seconds = [run.step() for _ in range(3 if args.toy else args.rounds)]
        rows[name] = {
            "tokens_per_second": run.tokens / statistics.median(seconds),
            "peak_bytes": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0,
            "losses": [loss for _, loss, _ in first],
            "gradient_norms": [norm for _, _, norm in first],
        }
        del run
    off = [
        max(abs(a / b - 1) for a, b in zip(rows["flex"][key], rows["mask"][key], strict=True))
        for key in ("losses", "gradient_norms")
    ]
    return {"ways": rows, "largest_relative_difference_of_losses_and_norms": off}


def first_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the first step of a fresh process, compilation included: cache of compiled code empty, then full."""
    rows: dict[str, dict[str, float]] = {}
    columns = shapes(args.toy)
    for name in ("baseline", "crown"):
        with tempfile.TemporaryDirectory() as cache:
            places = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
            for state in ("cold", "warm"):
                words = [sys.executable, *sys.argv, "--first-step", name]
                done = subprocess.run(words, env={**os.environ, **places}, stdout=subprocess.PIPE, check=True)
                rows.setdefault(name, {})[state] = json.loads(done.stdout.splitlines()[-1])
    return {
        "first_step_seconds": rows,
        "distinct_layers": {name: columns[name].distinct_layers for name in rows},
        "crown_over_baseline": {
            state: rows["crown"][state] / rows["baseline"][state] for state in ("cold", "warm")
        },
    }


def loss_memory(args: argparse.Namespace) -> dict[str, Any]:
    """benchmarks/loss.py and, on a GPU, chunks.py on this device, which write files of their own."""
    sizes = (
        ["--tokens", "4096", "--vocabulary", "20000"] if args.toy else ["--d-model", "768", "--materialise"]
    )
    words = [sys.executable, str(HERE / "loss.py"), "--device", DEVICE, *sizes]
    ways = ([], ["--bf16"]) if args.bf16 else ([],)
    done = [subprocess.run([*words, *more]).returncode for more in ways]
    if DEVICE == "cuda":
        chunks = [sys.executable, str(HERE / "chunks.py"), "--device", DEVICE]
        done += [subprocess.run([*chunks, *more]).returncode for more in ways]
    return {"exit_codes": done}


class Stop(Exception):
    """Ends a run from its reporter, as a kill would, right after a checkpoint."""


def checkpoints(args: argparse.Namespace) -> dict[str, Any]:
    """A run of the training loop that is stopped in the middle and resumed, against one that is not.

    Bytes of the standard library, the crown's layers; losses are compared step by step.
    """
    from entasis.data.prepare import prepare
    from entasis.train.recipe import from_dict
    from entasis.train.run import train

    shape = shapes(args.toy)["crown"].to_dict()
    shape.pop("vocabulary")
    sequence, sequences = (64, 4) if args.toy else (1024, args.batch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(["stdlib"], folder / "corpus", tokenizer="bytes", limit=1_000_000 if args.toy else 8_000_000)
        recipe = from_dict(
            {
                "shape": shape,
                "data": {"train": str(folder / "corpus/train"), "sequence": sequence},
                "batch": {"tokens": sequence * sequences},
                "tokens": 8 * sequence * sequences,
                "checkpoint": {"every": 4},
                "compile": args.compile and not args.toy,
            }
        )
        losses: dict[str, list[float]] = {"undisturbed": [], "stopped": []}
        saving: list[float] = []

        def listener(which: str, stop_at: int | None) -> Any:
            begun = 0.0

            def listen(event: dict[str, Any]) -> None:
                nonlocal begun
                if event["event"] == "step":
                    losses[which].append(event["loss"])
                    begun = time.perf_counter()
                elif event["event"] == "checkpoint":
                    saving.append(time.perf_counter() - begun)
                    if event["step"] == stop_at:
                        raise Stop

            return listen

        train(recipe, folder / "undisturbed", reporter=listener("undisturbed", None))
        with contextlib.suppress(Stop):
            train(recipe, folder / "stopped", reporter=listener("stopped", 4))
        begun = time.perf_counter()
        train(recipe, folder / "stopped", reporter=listener("stopped", None))
        resumed = time.perf_counter() - begun
        saved = sorted((folder / "stopped/checkpoints").iterdir())[-1]
        size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
    pairs = zip(losses["undisturbed"], losses["stopped"], strict=True)
    return {
        "losses": losses,
        "largest_difference": max(abs(a - b) for a, b in pairs),
        "checkpoint_bytes": size,
        "seconds_to_save": statistics.median(saving),
        "seconds_of_the_resumed_half": resumed,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="tiny shapes, three steps")
    parser.add_argument("--batch", type=int, default=32, help="sequences of 1024 in a step (32)")
    parser.add_argument("--rounds", type=int, default=20)
    names = ["speed", "documents", "first_steps", "loss_memory", "checkpoints"]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--eager", action="store_true", help="without compiling, which takes minutes a shape")
    parser.add_argument("--first-step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.bf16 = DEVICE == "cuda"
    args.compile = not args.eager and devices.has_compiler(torch.device(DEVICE))
    return args


if __name__ == "__main__":
    main()
