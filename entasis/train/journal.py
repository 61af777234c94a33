"""What a run tells as it goes: `metrics.jsonl` and TensorBoard always, Weights & Biases if asked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entasis import files
from entasis.errors import Damaged
from entasis.train.recipe import Logging

METRICS = "metrics.jsonl"


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without a last one that was cut off. Raises `Damaged`."""
    path = folder / METRICS
    return _parsed(path, _lines(path.read_bytes())) if path.is_file() else []


def kept(folder: Path, state: Mapping[str, Any]) -> bytes:
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


class Journal:
    """Writes one record a step. A resumed run forgets the records after the step it resumes from.

    `state` is that of the checkpoint to go on from. Raises `Damaged`, see `kept`.
    """

    def __init__(self, folder: Path, wanted: Logging, state: Mapping[str, Any]) -> None:
        earlier, step = kept(folder, state), state["step"]
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
