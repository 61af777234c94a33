"""Peak memory of the loss with a large vocabulary, against logits that are all in memory at once.

    python benchmarks/loss.py [--vocabulary 50304] [--tokens 32768] [--device cuda] [--bf16]

Ours runs forward and backward in a fresh process; measured is what it takes beyond inputs and gradients: on the CPU
by the process's largest resident size, on CUDA by the allocator. Materialised logits are counted as one fp32 tensor
[tokens, vocabulary], though a plain cross-entropy keeps that and its gradient; with --materialise it runs too,
and on CUDA Liger Kernel's loss where that is installed (the extra `gpu`). The reference for the values is fp32
throughout, a slice of the tokens at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import write
from safetensors.torch import load_file, save_file

from entasis.model.loss import summed_nll

WAYS = ("reference", "chunked", "materialised", "liger")
SLICE = 2048


def main() -> None:
    """Writes and prints benchmarks/results/loss-TIME.json."""
    args = arguments()
    if args.way:
        one(args)
        return
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ways = WAYS[: 3 if args.materialise else 2]
        if args.device == "cuda" and importlib.util.find_spec("liger_kernel"):
            ways += ("liger",)
        for way in ways:
            command = [sys.executable, *sys.argv, "--way", way, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows[way] = json.loads(done.stdout.splitlines()[-1])
        want, have = (load_file(Path(folder) / f"{way}.safetensors") for way in WAYS[:2])
    logits = 4 * args.vocabulary * args.tokens
    write(
        "loss",
        ["torch"],
        settings=vars(args),
        threads=torch.get_num_threads(),
        logits_bytes=logits,
        extra_bytes={way: row["extra_bytes"] for way, row in rows.items() if way != "reference"},
        memory_ratio=rows["chunked"]["extra_bytes"] / logits,
        seconds={way: row["seconds"] for way, row in rows.items()},
        nats_per_token={way: row["loss"] / args.tokens for way, row in rows.items()},
        relative_difference_of_loss=abs(rows["chunked"]["loss"] / rows["reference"]["loss"] - 1),
        relative_difference_of_gradients={
            name: ((have[name] - want[name]).norm() / want[name].norm()).item() for name in want
        },
    )


def one(args: argparse.Namespace) -> None:
    """One way in this process; its gradients go to the folder."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(args.tokens, args.d_model, generator=generator).to(args.device)
    weight_VD = (0.02 * torch.randn(args.vocabulary, args.d_model, generator=generator)).to(args.device)
    targets_N = torch.randint(args.vocabulary, (args.tokens,), generator=generator).to(args.device)
    for x in (x_ND, weight_VD):
        x.requires_grad_()
        x.grad = torch.zeros_like(x)
    # What the library allocates once buffers are there before the measurement begins.
    loss_of(args.way, x_ND[:64], weight_VD, targets_N[:64]).backward()
    for x in (x_ND, weight_VD):
        x.grad.zero_()
    before = peak(args.device)
    begun = time.perf_counter()
    value = 0.0
    rows = SLICE if args.way == "reference" else args.tokens
    for i in range(0, args.tokens, rows):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16 and args.way != "reference"):
            loss = loss_of(args.way, x_ND[i : i + rows], weight_VD, targets_N[i : i + rows])
        loss.backward()
        value += loss.item()
    seconds = time.perf_counter() - begun
    extra = peak(args.device) - before
    print(json.dumps({"loss": value, "extra_bytes": extra, "seconds": seconds}))
    gradients = {"hidden": x_ND.grad.cpu(), "head": weight_VD.grad.cpu()}
    save_file(gradients, Path(args.folder) / f"{args.way}.safetensors")


def loss_of(way: str, x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    if way == "chunked":
        return summed_nll(x_ND, weight_VD, None, targets_N)
    if way == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        dtype = torch.bfloat16 if torch.is_autocast_enabled("cuda") else x_ND.dtype
        return LigerFusedLinearCrossEntropyLoss(reduction="sum")(
            weight_VD.to(dtype), x_ND.to(dtype), targets_N
        )
    return F.cross_entropy(F.linear(x_ND, weight_VD), targets_N, reduction="sum")


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=50_304)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--d-model", type=int, default=192)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast, as in training on a GPU")
    parser.add_argument(
        "--materialise", action="store_true", help="run the plain loss too: three times its logits"
    )
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
