"""How many tokens' logits the loss should make at a time on this device.

    OMP_NUM_THREADS=1 python benchmarks/chunks.py
    python benchmarks/chunks.py --device cuda --bf16

Head and loss, forward and backward, eager, with chunks of different numbers of tokens in turn; medians, on a CPU of the
processor's time, so that a shared machine matters less. On a GPU also the most memory that each takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from common import write

from entasis.model.loss import LOGITS_AT_ONCE, summed_nll

ROUNDS = 5
SIZES = {
    "cpu": (192, {8_192: 2048, 50_304: 1024}, (32, 64, 128, 256)),
    "cuda": (768, {50_304: 32_768}, (512, 1024, 2048, 4096, 8192)),
}
"""d_model; vocabularies, each with the tokens of a batch; tokens of a chunk, beside what 64 MB hold."""


def main() -> None:
    """Writes and prints benchmarks/results/chunks-TIME.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    d_model, vocabularies, _ = SIZES[args.device]
    write(
        "chunks",
        ["torch"],
        threads=torch.get_num_threads(),
        device=args.device,
        precision="bf16" if args.bf16 else "fp32",
        d_model=d_model,
        vocabularies={str(vocabulary): measured(args, vocabulary) for vocabulary in vocabularies},
    )


def measured(args: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """Seconds of each chunk, as a share of those of chunks of 64 MB too, and bytes."""
    d_model, vocabularies, sizes = SIZES[args.device]
    tokens, on_gpu = vocabularies[vocabulary], args.device == "cuda"
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(tokens, d_model, generator=generator).to(args.device).requires_grad_()
    weight_VD = (0.02 * torch.randn(vocabulary, d_model, generator=generator)).to(args.device)
    weight_VD.requires_grad_()
    targets_N = torch.randint(vocabulary, (tokens,), generator=generator).to(args.device)
    of_64_mb = min(tokens, LOGITS_AT_ONCE // vocabulary)
    seconds: dict[int, list[float]] = {rows: [] for rows in (*sizes, of_64_mb)}
    peak: dict[int, int] = {}
    for _ in range(ROUNDS + on_gpu):
        for rows, taken in seconds.items():
            x_ND.grad = weight_VD.grad = None
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            begun = time.perf_counter() if on_gpu else time.process_time()
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                total = summed_nll(x_ND, weight_VD, None, targets_N, at_once=rows * vocabulary)
            total.backward()
            if on_gpu:
                torch.cuda.synchronize()
                peak[rows] = torch.cuda.max_memory_allocated() - before
            taken.append((time.perf_counter() if on_gpu else time.process_time()) - begun)
    # The first round on a GPU warms it up.
    medians = {rows: statistics.median(taken[int(on_gpu) :]) for rows, taken in seconds.items()}
    return {
        "tokens": tokens,
        "seconds": medians,
        "share_of_64_MB": {rows: value / medians[of_64_mb] for rows, value in medians.items()},
        "extra_bytes": peak,
    }


if __name__ == "__main__":
    main()
