"""The order of a thousand million windows: seconds and memory to begin, to draw a batch, and to jump anywhere.

    python benchmarks/sampler.py

The same for a thousand windows beside it: nothing may grow with their number. numpy's stored permutation stands for
what is saved.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from typing import Any

import numpy as np
from common import write

from entasis.data.sampler import Sampler

MANY, BATCH, ROUNDS = 10**9, 384, 200


def main() -> None:
    """Writes and prints benchmarks/results/sampler-TIME.json."""
    figures = {str(n): measured(n) for n in (1_000, 1_000_000, MANY)}
    begun = time.perf_counter()
    stored = np.random.default_rng(0).permutation(10_000_000)
    write(
        "order",
        ["numpy"],
        batch=BATCH,
        windows=figures,
        memory_ratio=figures[str(MANY)]["peak_bytes"] / figures["1000"]["peak_bytes"],
        numpy_permutation_of_1e7={"seconds": time.perf_counter() - begun, "bytes": stored.nbytes},
        distinct_among_a_million=distinct(),
    )


def measured(n: int) -> dict[str, Any]:
    """Bytes allocated at most and median seconds of one batch, at places all over the first ten epochs."""
    tracemalloc.start()
    sampler = Sampler(n, seed=0)
    places = np.linspace(0, 10 * n, ROUNDS, dtype=np.int64)
    for place in places[:20]:
        sampler.indices(int(place), BATCH)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    seconds = []
    for place in places:
        begun = time.perf_counter()
        sampler.indices(int(place), BATCH)
        seconds.append(time.perf_counter() - begun)
    return {"peak_bytes": peak, "seconds_per_batch": statistics.median(seconds)}


def distinct() -> int:
    """Different windows among the million from the middle of an epoch: all, for a permutation."""
    return len(np.unique(Sampler(MANY, seed=0).indices(MANY // 2, 1_000_000)))


if __name__ == "__main__":
    main()
