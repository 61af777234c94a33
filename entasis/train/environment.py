"""What `environment.json` says of software and machine."""

from __future__ import annotations

import platform
from typing import Any

import numpy
import torch

import entasis
from entasis.train import parallel


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
