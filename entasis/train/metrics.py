"""The metrics of a run: one record a step in `metrics.jsonl`, TensorBoard and Weights & Biases; speed, MFU and memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from entasis import files
from entasis.errors import Damaged
from entasis.train.recipe import Logging

METRICS = "metrics.jsonl"
_CLEAR = Path("/proc/self/clear_refs")
"""Linux: writing 5 resets the peak of the resident size (proc(5))."""


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without a last one that was cut off. Raises `Damaged`."""
    path = folder / METRICS
    return _parsed(path, _lines(path.read_bytes())) if path.is_file() else []


def records_until(folder: Path, state: Mapping[str, Any]) -> bytes:
    """The part of `metrics.jsonl` up to the step of a checkpoint's `state`, which says its length and hash.

    Raises `Damaged` where lines of those steps are missing or were changed.
    """
    path, step, told = folder / METRICS, state["step"], state.get("metrics")
    content = path.read_bytes() if path.is_file() else b""
    lines = _lines(content[: told["bytes"]] if told else content)[:step]
    if len(lines) < step:
        raise Damaged(
            f"damaged: {path} has only {len(lines)} of {step} lines; restore it, or choose another --output"
        )
    content = b"".join(lines)
    steps = [row.get("step") for row in _parsed(path, lines)]
    if steps != list(range(1, step + 1)) or (told and hashlib.sha256(content).hexdigest() != told["hash"]):
        raise Damaged(f"damaged: {path} is not what was written; restore it, or choose another --output")
    return content


def _lines(content: bytes) -> list[bytes]:
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def _parsed(path: Path, lines: list[bytes]) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise Damaged(f"damaged: line {number} of {path} is no longer JSON") from error
    return rows


class MetricsWriter:
    """Writes one record a step. A resumed run forgets the records after the step it resumes from.

    `state` is that of the checkpoint to go on from. Raises `Damaged`, see `records_until`.
    """

    def __init__(self, folder: Path, wanted: Logging, state: Mapping[str, Any]) -> None:
        earlier, step = records_until(folder, state), state["step"]
        files.write_bytes(folder / METRICS, earlier, locked=True)
        self._digest, self._size = hashlib.sha256(earlier), len(earlier)
        self._lines = (folder / METRICS).open("ab")
        self._tensorboard = None
        if wanted.tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._tensorboard = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        self._wandb = _start_wandb(folder) if wanted.wandb else None

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record; its numbers become curves."""
        line = (json.dumps(record) + "\n").encode()
        self._lines.write(line)
        self._lines.flush()
        self._digest.update(line)
        self._size += len(line)
        numbers = {
            k: v for k, v in record.items() if isinstance(v, int | float) and k not in ("step", "warming")
        }
        if self._tensorboard:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, record["step"])
            for i, text in enumerate(record.get("samples", [])):
                self._tensorboard.add_text(f"sample {i}", text, record["step"])
        if self._wandb:
            self._wandb.log(numbers, step=record["step"])

    def mark(self) -> dict[str, Any]:
        """Length and hash of what is written, which survives a power cut from now on: for a checkpoint's `state`."""
        os.fsync(self._lines.fileno())
        return {"bytes": self._size, "hash": self._digest.hexdigest()}

    def close(self) -> None:
        # Lines are written one by one; what a full disk still refuses must not hide why the run ended.
        with contextlib.suppress(OSError):
            self._lines.close()
        with contextlib.suppress(OSError):
            if self._tensorboard:
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _start_wandb(folder: Path) -> Any:
    import wandb

    # The id is the folder's name, so a resumed run goes on in the same place.
    return wandb.init(project="entasis", id=folder.name, name=folder.name, dir=folder, resume="allow")


def mfu(tokens_per_second: float, flops_per_token: int, ceiling: float, world: int) -> float:
    """MFU: the model's matmul FLOP/s as a share of what one large matrix product reaches there."""
    return tokens_per_second * flops_per_token / (ceiling * world)


def reset_peak_memory(device: torch.device) -> None:
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
    """Bytes since `reset_peak_memory`: on CUDA the most that was allocated, on the CPU the process's largest resident size."""
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


def steady_median(records: Sequence[dict[str, Any]], key: str) -> float:
    """The median of `key` over the steps that are not warming up (the first after each start are)."""
    warm = [record[key] for record in records if not record["warming"]]
    return statistics.median(warm or [record[key] for record in records])
