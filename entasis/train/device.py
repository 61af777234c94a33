"""The device of a run, and what it can do, measured rather than assumed.

bf16 is 5 times faster than fp32 on a CPU with AMX and 100 times slower on one without, and both say they
support it. What a recipe leaves to `auto` is chosen by `entasis.train.auto_settings`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch

from entasis.errors import UserError
from entasis.train import parallel


def choose_device(name: str) -> torch.device:
    """The device of this rank; `auto` is CUDA where there is one, else the CPU. Raises `UserError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError("torch knows it, nothing here runs on it")
    except RuntimeError as error:
        raise UserError(f"recipe: device is {name!r}; use auto, cpu, cuda or cuda:0") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "recipe: device is cuda, but this machine or this torch has no CUDA; use device=cpu"
            )
        if chosen.index is None:
            chosen = torch.device("cuda", parallel.local_rank())
        elif parallel.world() > 1:
            raise UserError(f"recipe: device is {name}, for {parallel.world()} processes; use device=cuda")
        if chosen.index >= (count := torch.cuda.device_count()):
            raise UserError(f"recipe: device is {chosen}, but this process sees {count} CUDA devices")
        torch.cuda.set_device(chosen)
    return chosen


def bf16_product_is_faster(device: torch.device) -> bool:
    """Whether a matrix product in bf16 takes less time than in fp32; measured, about 50 ms."""
    size = (
        4096 if device.type == "cuda" else 256
    )  # a GPU takes longer to be told of a small one than to make it
    return _matmul_seconds(size, torch.bfloat16, device) < _matmul_seconds(size, torch.float32, device)


def set_threads() -> None:
    """As many threads as OMP_NUM_THREADS says, if it does; torch itself looks only when it is imported."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit():
        torch.set_num_threads(int(threads))


def measure_matmul_ceiling(device: torch.device, precision: str) -> float:
    """FLOP/s of a large square matrix product: the measured 100 % of MFU."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if device.type == "cuda" else 512
    return 2 * size**3 / _matmul_seconds(size, dtype, device)


def is_busy(device: torch.device) -> bool:
    """Whether other work takes the processor: a product gets less than 0.8 of the time of its threads. Never on CUDA.

    A ceiling measured then is too low, and an MFU against it too high.
    """
    if device.type == "cuda":
        return False
    a = torch.ones(512, 512)
    wall, used = time.perf_counter(), time.process_time()
    for _ in range(30):
        a @ a
    wall, used = time.perf_counter() - wall, time.process_time() - used
    return used < 0.8 * wall * torch.get_num_threads()


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can build its code here: it needs a C++ compiler on the CPU, triton on CUDA."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton  # torch imports it only when it compiles

        return has_triton()
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in (named, "g++", "clang++", "c++") if name)


def shortest_seconds(work: Callable[[], Any], device: torch.device, *, repeats: int = 3) -> float:
    """The shortest of some timings of `work`, after one to warm up."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(repeats))


def _matmul_seconds(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a = torch.ones(size, size, dtype=dtype, device=device)
    return shortest_seconds(lambda: a @ a, device)
