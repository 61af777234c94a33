"""Software and machine: what `environment.json` says of them, and what of them is slow (`entasis environment`)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import psutil
import torch

import entasis
from entasis.train import device as devices
from entasis.train import parallel

EXTRAS = {
    "transformers": "hf",
    "datasets": "hf",
    "peft": "lora",
    "lm_eval": "eval",
    "ray": "ray",
    "submitit": "slurm",
    "wandb": "wandb",
    "liger_kernel": "gpu",
}
"""Modules that are not needed, and the extra of entasis that installs each."""
_LEAST_DISK, _LEAST_MEMORY = 5 << 30, 2 << 30
"""Bytes below which it is said that they are few."""


def describe_environment(device: torch.device) -> dict[str, Any]:
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


def examine_environment(folder: Path) -> dict[str, Any]:
    """Software, processor and GPU as a mapping, speeds measured (about a second), and what is `slow`: (what, cure) pairs.

    The disk is that of `folder`.
    """
    device = devices.choose_device("auto")
    flags = _cpu_flags()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    found: dict[str, Any] = {
        **describe_environment(device),
        "torch_build": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only",
        "cpu_features": [
            name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve") if name in flags
        ],
        "cores": cores,
        "physical_cores": psutil.cpu_count(logical=False),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "busy": devices.is_busy(torch.device("cpu")),
        "flops_per_second": {
            precision: devices.measure_matmul_ceiling(device, precision) for precision in ("fp32", "bf16")
        },
        "compiler": devices.has_compiler(device),
        "gpus": [
            {"name": p.name, "bytes": p.total_memory}
            for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
        "memory_bytes": memory.total,
        "free_memory_bytes": memory.available,
        "free_disk_bytes": shutil.disk_usage(folder).free,
        "extras": {name: _version(name) for name in EXTRAS},
    }
    found["slow"] = list(_what_is_slow(found))
    return found


def _what_is_slow(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what is slow or short, what to do about it), from the mapping above."""
    threads, cores = found["threads"], found["cores"]
    if found["busy"]:
        yield (
            "other work takes the processor: all speeds here are too low",
            "wait until it is done, and ask again",
        )
    if threads > cores:
        yield f"{threads} threads on {cores} cores wait for one another", f"export OMP_NUM_THREADS={cores}"
    elif threads < min(cores, found["physical_cores"] or cores):
        why = "OMP_NUM_THREADS is set" if found["OMP_NUM_THREADS"] else "torch chose so"
        yield (
            f"torch uses {threads} of {cores} cores ({why})",
            f"export OMP_NUM_THREADS={cores}, unless other runs are to have the rest",
        )
    if not found["gpus"] and shutil.which("nvidia-smi"):
        yield (
            "there is an NVIDIA driver, but this torch sees no GPU",
            "install torch's CUDA build (pytorch.org says how)",
        )
    fp32, bf16 = (found["flops_per_second"][precision] for precision in ("fp32", "bf16"))
    if bf16 < fp32:
        yield (
            f"bf16 makes {bf16 / fp32:.2f} of the products of fp32 in the same time",
            "leave precision to auto, or set precision=fp32; for bf16 take a processor with AVX512-BF16 or AMX, or a GPU",
        )
    if not found["compiler"]:
        what = "triton" if found["gpus"] else "a C++ compiler (apt-get install g++)"
        yield (
            "models cannot be compiled, which costs long runs up to a third of their speed",
            f"install {what}",
        )
    if found["free_disk_bytes"] < _LEAST_DISK:
        yield (
            f"{found['free_disk_bytes'] / 2**30:.1f} GiB are free on the disk",
            "free some before a long run",
        )
    if found["free_memory_bytes"] < _LEAST_MEMORY:
        yield (
            f"{found['free_memory_bytes'] / 2**30:.1f} GiB of memory are free",
            "end other programs, or train smaller batches",
        )


def _cpu_flags() -> set[str]:
    """Instruction sets as Linux names them; none elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            return set(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())
    except OSError:
        return set()


def _version(module: str) -> str | None:
    """Of an installed module; None where it is not there. Nothing is imported."""
    if importlib.util.find_spec(module) is None:
        return None
    names = importlib.metadata.packages_distributions().get(module, [module])
    return importlib.metadata.version(names[0])
