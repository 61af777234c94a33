"""What every benchmark states beside its figures, and where it writes them."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """The processor, its cores and the GPU if there is one."""
    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        name = names[0] if names else name
    text = f"{name}, {os.cpu_count()} cores"
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        text += f", {sys.modules['torch'].cuda.get_device_name()}"
    return text


def write(name: str, packages: list[str], **figures: Any) -> Path:
    """Writes `benchmarks/results/NAME-TIME.json`, prints it, and returns where. Never overwrites."""
    now = datetime.datetime.now()
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": now.isoformat(timespec="seconds"),
        "machine": machine(),
        "commit": _commit(),
        "versions": {package: _version(package) for package in packages},
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{now:%Y-%m-%d-%H%M%S}.json"
    text = json.dumps(result, indent=1) + "\n"
    with path.open("x") as file:
        file.write(text)
    print(text, path, sep="")
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or None
