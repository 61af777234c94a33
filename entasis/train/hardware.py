"""What this machine can do, measured rather than assumed.

bf16 is 5 times faster than fp32 on a CPU with AMX and 100 times slower on one without, and both say they
support it. So the choices a recipe leaves to `auto` are made by short measurements, written to
`environment.json`, and read from there when the run is resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy
import torch

import entasis
from entasis.errors import UserError
from entasis.files import write_text
from entasis.model.attention import Attention
from entasis.shape.cost import flops_per_token
from entasis.shape.shapes import ModelShape
from entasis.train import parallel
from entasis.train.recipe import Recipe


def device(name: str) -> torch.device:
    """The device of this rank; `auto` is CUDA where there is one, else the CPU. Raises `UserError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"recipe: device is {name!r}; use auto, cpu, cuda or cuda:0") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "recipe: device is cuda, but this machine or this torch has no CUDA; use device=cpu"
            )
        if chosen.index is None:
            chosen = torch.device("cuda", parallel.local_rank())
        torch.cuda.set_device(chosen)
    return chosen


def precision(device: torch.device) -> Literal["fp32", "bf16"]:
    """`bf16` where its matrix product is faster than fp32's, measured; else `fp32`. About 50 ms."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fp32 = _matmul_seconds(256, torch.float32, device)
    bf16 = _matmul_seconds(256, torch.bfloat16, device)
    return "bf16" if bf16 * 1.3 < fp32 else "fp32"


def matmul_ceiling(device: torch.device, precision: str) -> float:
    """FLOP/s of a large square matrix product: the measured 100 % of MFU."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if device.type == "cuda" else 512
    return 2 * size**3 / _matmul_seconds(size, dtype, device)


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can build its code here: it needs a C++ compiler on the CPU, triton on CUDA."""
    if device.type == "cuda":
        return torch.utils._triton.has_triton()
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in (named, "g++", "clang++", "c++") if name)


def attention(
    device: torch.device, precision: str, shape: ModelShape, sequence: int, *, compiled: bool
) -> Literal["sdpa", "plain"]:
    """The faster way to compute the widest layer's attention, forward and backward; on CUDA always `sdpa`.

    Measured as it will run: the compiler gains more on plain products than on the fused kernel. That takes half a
    minute of compilation; eager measurements take less than a second. Either is made once on a machine and then read
    from the user's cache folder.
    """
    layer = max(shape.layers, key=lambda layer: layer.n_heads)
    if device.type == "cuda" or not layer.n_heads:
        return "sdpa"
    known = _cache(
        processor(), torch.__version__, torch.get_num_threads(), precision, compiled, sequence,
        shape.d_model, shape.head_dim, shape.qk_norm, layer,
    )  # fmt: skip
    if known.is_file():
        return "plain" if known.read_text(encoding="utf-8") == "plain" else "sdpa"
    x_BTD = torch.zeros(max(1, 2048 // sequence), sequence, shape.d_model, device=device)

    def timed(implementation: str) -> float:
        module = Attention(shape, layer, implementation).to(device)
        run = torch.compile(module, dynamic=False) if compiled else module

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                run(x_BTD, None).sum().backward()

        return seconds(step, device)

    choice: Literal["sdpa", "plain"] = "plain" if timed("plain") < 0.95 * timed("sdpa") else "sdpa"
    with contextlib.suppress(OSError):  # a home that cannot be written to
        write_text(known, choice)
    return choice


def _cache(*what: object) -> Path:
    """The file that holds what was measured of `what`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "entasis" / hashlib.blake2b(repr(what).encode(), digest_size=16).hexdigest()


def compile_pays(device: torch.device, recipe: Recipe, shape: ModelShape) -> bool:
    """Whether compiling saves more seconds over the run than it costs; a rough estimate, on the safe side.

    Eager training reaches about a third of the matmul ceiling. Compiled, it takes about a tenth less time
    on a CPU and a third less on CUDA; building the code takes half a minute and some seconds for each
    distinct layer shape.
    """
    if not has_compiler(device):
        return False
    tokens = recipe.total_steps * int(recipe.batch.tokens) / parallel.world()
    work = tokens * flops_per_token(shape, recipe.data.sequence)
    eager_seconds = 3 * work / matmul_ceiling(device, recipe.precision)
    saved = eager_seconds / (3 if device.type == "cuda" else 10)
    return saved > 30 + 5 * shape.distinct_layers


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and threads: what the numbers of a run depend on beside its recipe."""
    return {
        "versions": {
            "entasis": entasis.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "platform": platform.platform(),
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "world": parallel.world(),
    }


def processor() -> str:
    """The CPU's name and widest instruction set."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            name = next(
                (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name
            )
    except OSError:
        pass
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def seconds(work: Callable[[], Any], device: torch.device, *, repeats: int = 3) -> float:
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
    return seconds(lambda: a @ a, device)
