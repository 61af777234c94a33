"""How many tokens' logits the loss should make at a time on this CPU.

    OMP_NUM_THREADS=1 python benchmarks/chunks.py

Head and loss, forward and backward, eager, with chunks of different numbers of tokens in turn; medians of the
processor's time, so that a shared machine matters less.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from common import write

from entasis.model.loss import LOGITS_AT_ONCE, summed_nll

D_MODEL, ROUNDS = 192, 5
SIZES = {8_192: 2048, 50_304: 1024}
"""Vocabularies, and tokens in a batch."""


def main() -> None:
    """Writes and prints benchmarks/results/chunks-TIME.json."""
    write(
        "chunks",
        ["torch"],
        threads=torch.get_num_threads(),
        d_model=D_MODEL,
        vocabularies={str(vocabulary): measured(vocabulary) for vocabulary in SIZES},
    )


def measured(vocabulary: int) -> dict[str, Any]:
    """Seconds of each chunk, and as a share of those of chunks of 64 MB."""
    tokens = SIZES[vocabulary]
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(tokens, D_MODEL, generator=generator).requires_grad_()
    weight_VD = (0.02 * torch.randn(vocabulary, D_MODEL, generator=generator)).requires_grad_()
    targets_N = torch.randint(vocabulary, (tokens,), generator=generator)
    largest = min(tokens, LOGITS_AT_ONCE // vocabulary)
    seconds: dict[int, list[float]] = {rows: [] for rows in (32, 64, 128, 256, largest)}
    for _ in range(ROUNDS):
        for rows, taken in seconds.items():
            begun = time.process_time()
            summed_nll(x_ND, weight_VD, None, targets_N, at_once=rows * vocabulary).backward()
            taken.append(time.process_time() - begun)
    medians = {rows: statistics.median(taken) for rows, taken in seconds.items()}
    return {
        "tokens": tokens,
        "seconds": medians,
        "share_of_64_MB": {rows: value / medians[largest] for rows, value in medians.items()},
    }


if __name__ == "__main__":
    main()
