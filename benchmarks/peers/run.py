"""Training tokens per second of Entasis and of others, on the same shape, machine and day.

    python benchmarks/peers/run.py [--size small] [--peers entasis entasis+compile hf hf+compile litgpt]
    python benchmarks/peers/run.py --nanogpt ~/nanoGPT

The small size: 6 layers, d 192, 6 heads, SwiGLU of 512, vocabulary 8192 tied, 256 tokens, 8 sequences: 4.2 million
parameters. Everyone makes whole steps with their own training loop: AdamW, gradients clipped to norm 1, data from
the same corpus. On a machine that others use too, `--clock cpu` with OMP_NUM_THREADS=1 counts the processor time of
the one thread instead of the time on the wall. A round starts every peer once, in a process and virtual environment of its own, and takes the
median of its steps after the first five; the figures are medians over rounds, the ratios medians of ratios within
a round. A peer is one adapter NAME_peer.py in this folder: it is given the settings as JSON and prints the seconds of its steps
and how it ran.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache/peers"
sys.path.insert(0, str(HERE.parent))

from common import write  # noqa: E402

if TYPE_CHECKING:
    from entasis.shape.shapes import ModelShape

SIZES = {
    "small": {"layers": 6, "d_model": 192, "heads": 6, "d_ff": 512, "batch": 8},
    "medium": {"layers": 12, "d_model": 384, "heads": 6, "d_ff": 1024, "batch": 8},
}
TORCH = "torch==2.13.0"
NEEDS: dict[str, list[str] | None] = {
    "entasis": None,
    "hf": [TORCH, "numpy", "transformers==5.23.0", "accelerate"],
    "litgpt": [TORCH, "numpy", "litgpt==0.5.13", "requests"],
    "nanogpt": [TORCH, "numpy"],
}
"""What each environment holds; None is the one that runs this script. torch first, so that all have the same."""
WARM_UP = 5


def main() -> None:
    """Writes and prints benchmarks/results/peers-TIME.json."""
    args = arguments()
    peers = [*args.peers, *(["nanogpt", "nanogpt+compile"] if args.nanogpt else [])]
    corpus = prepare()
    interpreters = {name: interpreter(name) for name in dict.fromkeys(p.partition("+")[0] for p in peers)}
    if args.clock == "cpu" and (os.environ.get("OMP_NUM_THREADS") != "1" or args.nanogpt):
        raise SystemExit("--clock cpu needs OMP_NUM_THREADS=1, and nanoGPT cannot be timed by it")
    matmul = ceilings(time.process_time if args.clock == "cpu" else time.perf_counter)
    if args.precision == "bf16" and matmul["bf16"] < matmul["fp32"]:
        share = matmul["bf16"] / matmul["fp32"]
        raise SystemExit(f"a bf16 matrix product here has {share:.3f} of fp32's speed: nothing to compare")
    rounds: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}
    for i in range(args.rounds):
        # Backwards every other round, so that nobody always has the warmer machine.
        for peer in peers if i % 2 == 0 else reversed(peers):
            name, _, mode = peer.partition("+")
            settings = {
                **SIZES[args.size],
                "vocabulary": 8192,
                "sequence": 256,
                "steps": args.steps + WARM_UP,
                "corpus": str(corpus),
                "precision": args.precision,
                "compile": mode == "compile",
                "nanogpt": args.nanogpt,
                "clock": args.clock,
            }
            rounds[peer].append(one(interpreters[name], name, settings))
            print(f"round {i + 1}: {peer} {rounds[peer][-1]['tokens_per_second']:,.0f} tokens/s", flush=True)
    speed = {peer: [row["tokens_per_second"] for row in rows] for peer, rows in rounds.items()}
    medians = {peer: statistics.median(values) for peer, values in speed.items()}
    write(
        "peers",
        ["torch"],
        settings={"size": args.size, **SIZES[args.size], "vocabulary": 8192, "sequence": 256},
        precision=args.precision,
        clock=args.clock,
        matmul_flops_per_second=matmul,
        threads=os.environ.get("OMP_NUM_THREADS", "default"),
        load=os.getloadavg()[0],
        tokens_per_second=medians,
        # The FLOPs are those of the SwiGLU shape, which all but nanoGPT have exactly.
        mfu={peer: value * flops_per_token(args.size) / matmul[args.precision] for peer, value in medians.items()},
        ratios={
            ours: {
                peer: statistics.median(a / b for a, b in zip(speed[ours], values, strict=True))
                for peer, values in speed.items()
                if not peer.startswith("entasis")
            }
            for ours in peers
            if ours.startswith("entasis")
        },
        peers={peer: rows[0]["about"] for peer, rows in rounds.items()},
        rounds={peer: [{k: row[k] for k in ("tokens_per_second", "first_step", "load")} for row in rows]
                for peer, rows in rounds.items()},
    )  # fmt: skip


def one(python: Path, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One process of one peer: its speed, the first step's seconds, and what it says of itself."""
    load = os.getloadavg()[0]
    done = subprocess.run(
        [python, HERE / f"{name}_peer.py", json.dumps(settings)], capture_output=True, text=True, cwd=CACHE
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    seconds, cpu = told.pop("seconds"), told.pop("cpu")
    steps = [b - a for a, b in pairwise(cpu)] if settings["clock"] == "cpu" else seconds[1:]
    tokens = settings["batch"] * settings["sequence"]
    steady = statistics.median(steps[WARM_UP - 1 :])
    return {"tokens_per_second": tokens / steady, "first_step": seconds[0], "load": load, "about": told}


def prepare() -> Path:
    """The corpus, as Entasis reads it and as one array `tokens.npy` for the others."""
    corpus = CACHE / "corpus"
    if not corpus.exists():
        from entasis.data.prepare import prepare as make

        make(["stdlib"], corpus, tokenizer=None, train_tokenizer=8192, validation=0.05)
    if not (CACHE / "tokens.npy").exists():
        import numpy

        from entasis.data.corpus import Corpus

        read = Corpus(corpus / "train")
        numpy.save(CACHE / "tokens.npy", read.read(0, min(read.tokens, 4_000_000)))
    return corpus


def shape_of(size: str) -> ModelShape:
    """The model that all but nanoGPT have exactly."""
    from entasis.shape.shapes import LayerShape, ModelShape

    s = SIZES[size]
    return ModelShape(
        d_model=s["d_model"],
        head_dim=s["d_model"] // s["heads"],
        vocabulary=8192,
        layers=(LayerShape(s["heads"], s["heads"], s["d_ff"]),) * s["layers"],
        tied_embeddings=True,
        context=256,
    )


def flops_per_token(size: str) -> int:
    """By the cost model: the whole T × T of attention, training."""
    from entasis.shape import cost

    return cost.flops_per_token(shape_of(size), 256)


def interpreter(name: str) -> Path:
    """The python of the peer's own environment, made where there is none."""
    needs = NEEDS[name]
    if needs is None:
        return Path(sys.executable)
    folder = CACHE / name
    python = folder / "bin/python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True)
        # torch alone first: nothing later may replace it by another build.
        for wanted in (needs[:1], needs):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        (folder / "complete").touch()
    return python


def ceilings(clock: Callable[[], float]) -> dict[str, float]:
    """FLOP/s of a large matrix product in fp32 and bf16. bf16 is the faster only where the processor has units for it."""
    import torch

    def seconds(a: torch.Tensor) -> float:
        begun = clock()
        a @ a
        return clock() - begun

    result = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.ones(512, 512, dtype=dtype)
        result[name] = 2 * 512**3 / min(seconds(a) for _ in range(8))
    return result


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    peers = ["entasis", "entasis+compile", "hf", "hf+compile", "litgpt+compile"]
    parser.add_argument("--peers", nargs="+", default=peers)
    parser.add_argument("--nanogpt", metavar="DIR", help="a checkout of nanoGPT to drive too")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="timed in each round, after five to warm up")
    return parser.parse_args()


if __name__ == "__main__":
    main()
