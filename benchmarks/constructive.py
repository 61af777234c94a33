"""What a stage that trains the three newest of nine layers costs, beside one that trains all of them.

    OMP_NUM_THREADS=2 python benchmarks/constructive.py                      # the head costs at most one layer
    OMP_NUM_THREADS=2 python benchmarks/constructive.py --shape published    # d_model 1024, a vocabulary of 65536
    python benchmarks/constructive.py --shape published --device cuda --precision bf16
    python benchmarks/constructive.py --shape published --device cuda --precision bf16 --compile

Steps of both stages in turn, on random ids, after two that do not count; medians of wall time and of the processor's. With
--compile both stages run as compiled code, and are compiled in the steps that do not count; otherwise eagerly. Beside them the
cost model's FLOPs (forward of all, backward of what learns), and the bytes that AdamW and gradients hold. Goals: at most 0.6 of
the time where the head costs at most one layer; at the published shape 0.72 of the FLOPs remain.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from common import write

from entasis.shape import cost
from entasis.train.auto_settings import simplest
from entasis.train.recipe import from_dict
from entasis.train.resolve import resolve
from entasis.train.stage_runner import StageRunner
from entasis.train.stages import lay_out

SHAPES: dict[str, dict[str, Any]] = {
    "small-head": {"profile": "isotropic", "layers": 9, "d_model": 256, "head_dim": 32, "vocabulary": 2048,
                   "context": 256, "ffn_multipliers": {"value": 4.0}, "ffn": "gelu", "interface": {"kind": "binary"}},
    "published": {"preset": "constructive/9-layer-binary"},
}  # fmt: skip
STAGES = {"all": "all", "newest": ["blocks[6:]", "final_norm", "head"]}


def main() -> None:
    """Writes and prints benchmarks/results/constructive-TIME.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small-head")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true", help="both stages as compiled code, not eagerly")
    parser.add_argument("--tokens", type=int, default=2048, help="in a step (2048)")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    runners = _runners(args)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    for i in range(args.rounds + 2):
        for name, runner in runners.items():
            taken = _step(runner, args.tokens)
            if i >= 2:
                seconds[name].append(taken)
    figures = {name: _figures(runner, seconds[name]) for name, runner in runners.items()}
    everything, newest = figures["all"], figures["newest"]
    write(
        "constructive",
        ["torch"],
        threads=torch.get_num_threads(),
        shape=args.shape,
        precision=args.precision,
        compile=args.compile,
        tokens=args.tokens,
        **figures,
        newest_over_all={key: newest[key] / everything[key] for key in everything},
    )


def _runners(args: argparse.Namespace) -> dict[str, StageRunner]:
    sequence = min(256, args.tokens)
    recipe = from_dict(
        {
            "shape": SHAPES[args.shape],
            "data": {"train": "none", "sequence": sequence},
            "batch": {"tokens": args.tokens, "micro": args.tokens // sequence},
            "stages": [{"tokens": args.tokens, "trainable": chosen} for chosen in STAGES.values()],
            "precision": args.precision,
            "compile": args.compile,
            "device": args.device,
        }
    )
    device = torch.device(args.device)
    resolved, shape, _ = resolve(recipe, 0)
    spans = lay_out(simplest(resolved, device), shape)
    return {
        name: StageRunner(span, simplest(resolved, device), device)
        for name, span in zip(STAGES, spans, strict=True)
    }


def _step(runner: StageRunner, tokens: int) -> tuple[float, float]:
    """Wall and processor seconds of one optimizer step."""
    span = runner.span
    ids_BT = torch.randint(
        span.shape.vocabulary, (tokens // span.data.sequence, span.data.sequence), device=runner.device
    )
    _wait(runner.device)
    began, processor = time.perf_counter(), time.process_time()
    runner.accumulate(ids_BT, ids_BT, None, tokens=tokens, last=True)
    runner.step(runner.gradient_norm())
    _wait(runner.device)
    return time.perf_counter() - began, time.process_time() - processor


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _figures(runner: StageRunner, taken: list[tuple[float, float]]) -> dict[str, float]:
    span = runner.span
    memory = cost.training_memory(span.shape, span.trainable)
    states = [s for optimizer in runner.optimizers for s in optimizer.state.values()]
    held = sum(x.nbytes for s in states for x in s.values() if x.ndim)
    assert held == memory.optimizer, "the cost model says what AdamW holds"
    return {
        "seconds": statistics.median(wall for wall, _ in taken),
        "processor_seconds": statistics.median(processor for _, processor in taken),
        "flops_per_token": span.flops_per_token,
        "active_parameters": span.counts.active,
        "optimizer_bytes": held,
        "gradient_bytes": memory.gradients,
    }


if __name__ == "__main__":
    main()
