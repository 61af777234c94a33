"""What the trainer takes beyond forward, backward, clipping and update: tokens/s of `entasis train` against the bare steps.

    python benchmarks/trainer.py [--size small] [--precision bf16] [--eager] [--rounds 3] [--steps 20]

The bare steps are the same compiled loss and the same optimizer on ids that already lie in memory, with nothing logged,
written or waited for. Each round is one fresh process of either, backwards every other round; ratios are within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]

import run as peers  # noqa: E402
from common import write  # noqa: E402

WAYS = ("train", "steps")


def main() -> None:
    """Writes and prints benchmarks/results/trainer-TIME.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=peers.SIZES, default="small")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="timed in each round, after five to warm up")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        print(json.dumps(bare_steps(args.size, json.loads(args.bare))))
        return
    settings = {
        **peers.SIZES[args.size],
        "vocabulary": 8192,
        "sequence": 256,
        "steps": args.steps + peers.WARM_UP,
        "corpus": str(peers.prepare()),
        "precision": args.precision,
        "compile": not args.eager,
        "clock": "wall",
    }
    speed: dict[str, list[float]] = {way: [] for way in WAYS}
    for i in range(args.rounds):
        for way in WAYS if i % 2 == 0 else WAYS[::-1]:
            if way == "train":
                told = peers.one(Path(sys.executable), "entasis", settings)["tokens_per_second"]
            else:
                command = [sys.executable, __file__, "--size", args.size, "--bare", json.dumps(settings)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                told = json.loads(done.stdout.splitlines()[-1])
            speed[way].append(told)
            print(f"round {i + 1}: {way} {told:,.0f} tokens/s", flush=True)
    write(
        "trainer",
        ["torch"],
        size=args.size,
        precision=args.precision,
        compile=not args.eager,
        threads=os.environ.get("OMP_NUM_THREADS", "default"),
        tokens_per_second=speed,
        ratio=statistics.median(a / b for a, b in zip(speed["train"], speed["steps"], strict=True)),
    )


def bare_steps(size: str, settings: dict[str, Any]) -> float:
    """Tokens per second, the median of the steps after those to warm up."""
    from steps import Stepper

    stepper = Stepper(
        peers.shape_of(size),
        settings["batch"],
        settings["sequence"],
        compile=settings["compile"],
        bf16=settings["precision"] == "bf16",
        attention="plain",
    )
    seconds = [stepper.step() for _ in range(settings["steps"])][peers.WARM_UP :]
    return float(settings["batch"] * settings["sequence"] / statistics.median(seconds))


if __name__ == "__main__":
    main()
