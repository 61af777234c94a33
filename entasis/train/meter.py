"""Throughput, utilisation and memory of a run."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch


def utilisation(tokens_per_second: float, flops_per_token: int, ceiling: float, world: int) -> float:
    """MFU: the model's matmul FLOP/s as a share of what one large matrix product reaches there."""
    return tokens_per_second * flops_per_token / (ceiling * world)


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most that was allocated, on the CPU the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def steady(records: Sequence[dict[str, Any]], key: str) -> float:
    """The median of `key` over the steps that are not warming up (the first after each start are)."""
    warm = [record[key] for record in records if not record["warming"]]
    return statistics.median(warm or [record[key] for record in records])
