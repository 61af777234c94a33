"""Throughput, utilisation and memory of a run."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_CLEAR = Path("/proc/self/clear_refs")
"""Linux: writing 5 resets the peak of the resident size (proc(5))."""


def utilisation(tokens_per_second: float, flops_per_token: int, ceiling: float, world: int) -> float:
    """MFU: the model's matmul FLOP/s as a share of what one large matrix product reaches there."""
    return tokens_per_second * flops_per_token / (ceiling * world)


def forget_peak(device: torch.device) -> None:
    """Lets `peak_memory` begin anew, so that a run does not inherit the peak of one before it in its process.

    On a CPU only Linux can; a process elsewhere keeps its largest size for good.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        # What the allocator keeps of freed memory would count as the next run's.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes since `forget_peak`: on CUDA the most that was allocated, on the CPU the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (
        _CLEAR.exists()
    ):  # getrusage has a peak that nothing resets, and that a process inherits from its parent
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def steady(records: Sequence[dict[str, Any]], key: str) -> float:
    """The median of `key` over the steps that are not warming up (the first after each start are)."""
    warm = [record[key] for record in records if not record["warming"]]
    return statistics.median(warm or [record[key] for record in records])
