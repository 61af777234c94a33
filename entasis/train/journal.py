"""What a run tells as it goes: `metrics.jsonl` and TensorBoard always, Weights & Biases if asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from entasis.train.recipe import Logging


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without a last one that was cut off."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


class Journal:
    """Writes one record a step. A resumed run forgets the records after the step it resumes from."""

    def __init__(self, folder: Path, wanted: Logging, *, step: int) -> None:
        kept = [record for record in records(folder) if record["step"] <= step]
        partial = folder / "metrics.jsonl.partial"
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        partial.replace(folder / "metrics.jsonl")
        self._lines = (folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._tensorboard = None
        if wanted.tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._tensorboard = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        self._wandb = _start_wandb(folder) if wanted.wandb else None

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record; its numbers become curves."""
        self._lines.write(json.dumps(record) + "\n")
        numbers = {
            k: v for k, v in record.items() if isinstance(v, int | float) and k not in ("step", "warming")
        }
        if self._tensorboard:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb:
            self._wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        self._lines.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _start_wandb(folder: Path) -> Any:
    import wandb

    # The id is the folder's name, so a resumed run goes on in the same place.
    return wandb.init(project="entasis", id=folder.name, name=folder.name, dir=folder, resume="allow")
