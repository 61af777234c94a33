"""Checkpoints that are whole or do not exist.

    checkpoints/step-00000100/   __0_0.distcp …  .metadata   state.json   [model.safetensors  shape.json]
    checkpoints/step-00000100/complete           written last

Everything is written into `step-00000100.partial`, synced to disk, renamed, and only then marked with
`complete`. A folder without the mark was interrupted and is never read. torch's DCP metadata is a pickle,
so `load` is only ever given the run's own folder; what leaves the run is `model.safetensors`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from entasis.errors import Failure
from entasis.model import weights
from entasis.model.transformer import Transformer
from entasis.train import parallel, sharding

MARK = "complete"


def folders(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob("step-*")
    return sorted(folder for folder in found if (folder / MARK).is_file())


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def save(
    run: Path,
    step: int,
    model: Transformer,
    optimizers: Iterable[torch.optim.Optimizer],
    state: dict[str, Any],
    *,
    keep_last: int,
    keep_every: int | None,
) -> Path:
    """Writes the checkpoint of `step` and removes those that need not stay. Every rank calls it.

    `state` is plain JSON: stage, position, provenance. Raises `Failure` when the disk is full; the
    checkpoints before it are then untouched.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    partial = final.with_name(final.name + ".partial")
    kept = bool(keep_every and step % keep_every == 0)
    try:
        if parallel.is_main():
            _discard(partial)
            _discard(final)
            partial.mkdir(parents=True)
        parallel.barrier()
        with _quiet():
            dcp.save(_tensors(model, optimizers), checkpoint_id=partial, no_dist=parallel.world() == 1)
        gathered = sharding.whole(model) if kept else model
        if parallel.is_main():
            (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
            if kept:
                weights.save(gathered, partial)
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            partial.rename(final)
            sync(final.parent)
            mark(final)
            _forget_old(run, keep_last, keep_every)
    except (CheckpointException, OSError, RuntimeError) as error:
        if not is_disk_full(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise Failure(
            f"no space left on the disk of {run} while saving step {step}; free some and give the same "
            f"command: it goes on from {_last_name(run)}"
        ) from error
    parallel.barrier()
    return final


def load(folder: Path, model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Any]:
    """Puts a checkpoint of this very run into the model and optimizers (in place); returns its `state`."""
    optimizers = list(optimizers)
    tensors = _tensors(model, optimizers)
    with _quiet():
        dcp.load(tensors, checkpoint_id=folder, no_dist=parallel.world() == 1)
    set_state_dict(
        model, optimizers, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"]
    )
    torch.set_rng_state(tensors["rng"])
    return dict(json.loads((folder / "state.json").read_text(encoding="utf-8")))


def sync(path: Path) -> None:
    """Makes a file's content (or a folder's list of names) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def mark(folder: Path) -> None:
    """Declares a folder whole."""
    (folder / MARK).touch()
    sync(folder)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether ENOSPC or EDQUOT is behind an exception, DCP's wrapping included."""
    if isinstance(error, CheckpointException):
        return any(is_disk_full(wrapped[0]) for wrapped in error.failures.values())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return error is not None and is_disk_full(error.__cause__)


def _tensors(model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, list(optimizers))
    return {"model": model_state, "optimizer": optimizer_state, "rng": torch.get_rng_state()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Told that there is no process group, DCP warns that there is none.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _forget_old(run: Path, keep_last: int, keep_every: int | None) -> None:
    for folder in folders(run)[:-keep_last]:
        if not (keep_every and step_of(folder) % keep_every == 0):
            _discard(folder)


def _discard(folder: Path) -> None:
    # The mark goes first: a removal that is interrupted leaves nothing that could be taken for whole.
    (folder / MARK).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _last_name(run: Path) -> str:
    whole = folders(run)
    return f"step {step_of(whole[-1])}" if whole else "the beginning"
