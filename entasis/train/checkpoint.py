"""Checkpoints that are whole or do not exist.

    checkpoints/step-00000100/   __0_0.distcp …  .metadata   state.json   [resting.safetensors]
                                 [model.safetensors  shape.json  optimizer.safetensors]
    checkpoints/step-00000100/complete           written last, with a hash of every other file

Everything is written into `step-00000100.partial`, synced to disk, renamed, and only then marked with
`complete`. A folder without the mark was interrupted and is never read; one whose files do not have the hashes that the
mark holds is damaged, and the one before it is used. torch's DCP metadata is a pickle,
so `load` is only ever given the run's own folder; what leaves the run is `model.safetensors`.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from entasis import files
from entasis.errors import Damaged
from entasis.model import weights
from entasis.model.transformer import Transformer
from entasis.train import moments, parallel, sharding
from entasis.train.averaging import WeightAverage
from entasis.train.moments import Moments

MARK, STATE = "complete", "state.json"


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
    resting: Moments,
    average: WeightAverage | None = None,
    keep_last: int,
    keep_every: int | None,
) -> Path:
    """Writes the checkpoint of `step` and removes those that need not stay. Every rank calls it.

    `state` is plain JSON: stage, position, provenance; `resting` are moments of what does not learn now. Raises `DiskFull`; the checkpoints before it are then
    untouched.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    partial = final.with_name(final.name + ".partial")
    kept = bool(keep_every and step % keep_every == 0)
    optimizers = list(optimizers)
    tensors = _tensors(model, optimizers, average)
    try:
        if parallel.is_main():
            _discard(partial)
            _discard(final)
            partial.mkdir(parents=True)
        parallel.barrier()
        with _quiet():
            dcp.save(tensors, checkpoint_id=partial, no_dist=parallel.world() == 1)
        gathered = sharding.unsharded(model) if kept else model
        remembered = {**resting, **moments.gather(model, optimizers)} if kept else {}
        if parallel.is_main():
            files.write_json(partial / STATE, state, locked=True)
            if kept:
                weights.save(gathered, partial)
                moments.save(partial, remembered, state["positions"])
            if resting:
                moments.save(partial, resting, state["positions"], moments.RESTING)
            for file in partial.iterdir():
                files.sync(file)
            files.sync(partial)
            partial.rename(final)
            files.sync(final.parent)
            mark(final)
            _forget_old(run, step, keep_last, keep_every)
    except (CheckpointException, OSError, RuntimeError) as error:
        if not files.is_disk_full(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        if not (final / MARK).is_file():
            _discard(final)
        then = f"give the same command: it goes on from {last_name(run)}"
        raise files.no_space(final, error, need=_size(tensors), then=then) from error
    parallel.barrier()
    return final


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint (None where there is none yet), and what is to be said about others.

    Raises `Damaged` where there are checkpoints and none of them is sound.
    """
    notes: list[str] = []
    for folder in reversed(folders(run)):
        if not (folder / MARK).stat().st_size:
            notes.append(f"{folder} was saved by an earlier version, without hashes; it is taken as it is")
            return folder, notes
        what = damage(folder)
        if what is None:
            return folder, notes
        notes.append(f"damaged: {what}; going on from the checkpoint before it")
    if notes:
        first = notes[0].partition(";")[0]
        raise Damaged(
            f"{first}; no other checkpoint of {run} is sound: restore one, or choose another --output"
        )
    return None, notes


def damage(folder: Path) -> str | None:
    """The first file of a marked checkpoint that is not what was saved; None where all are."""
    try:
        told = files.read_json(folder / MARK)["files"]
    except (Damaged, KeyError):
        return f"{folder / MARK} is not what was written"
    for name, found in _hashes([folder / name for name in told if (folder / name).is_file()]).items():
        if told[name] != found:
            return f"{folder / name} is not what was saved"
    return next((f"{folder / name} is missing" for name in told if not (folder / name).is_file()), None)


def state_of(folder: Path) -> dict[str, Any]:
    """The `state` that a checkpoint was saved with. Raises `Damaged`."""
    state = files.read_json(folder / STATE)
    if state.get("step") != step_of(folder):
        raise Damaged(f"damaged: {folder / STATE} belongs to step {state.get('step')}")
    return state


def load(
    folder: Path,
    model: torch.nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    average: WeightAverage | None = None,
) -> None:
    """Puts a sound checkpoint of this very run into the model, its average and the optimizers, in place."""
    optimizers = list(optimizers)
    tensors = _tensors(model, optimizers, average)
    try:
        with _quiet():
            dcp.load(tensors, checkpoint_id=folder, no_dist=parallel.world() == 1)
    except Exception as error:
        if (folder / MARK).stat().st_size:
            raise  # its files are what was saved
        raise Damaged(f"damaged: {folder} cannot be read; choose another --output") from error
    set_state_dict(
        model, optimizers, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"]
    )
    torch.set_rng_state(tensors["rng"])


def resting(folder: Path) -> Moments:
    """The moments of what did not learn in the stage of a checkpoint. Raises `Damaged`."""
    return moments.load(folder, moments.RESTING)[0] if (folder / moments.RESTING).is_file() else {}


def mark(folder: Path) -> None:
    """Writes `complete` into a folder, with a hash of every file in it."""
    files.write_json(folder / MARK, {"files": _hashes(sorted(folder.iterdir()))}, locked=True)


def _tensors(
    model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer], average: WeightAverage | None
) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, list(optimizers))
    averaged = {} if average is None else {"average": average.state()}
    return {"model": model_state, "optimizer": optimizer_state, "rng": torch.get_rng_state(), **averaged}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Told that there is no process group, DCP warns that there is none.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _hashes(paths: list[Path]) -> dict[str, str]:
    # Files of several processes are hashed side by side: the interpreter's lock is not held meanwhile.
    with ThreadPoolExecutor(8) as pool:
        return dict(zip((path.name for path in paths), pool.map(files.hash_of, paths), strict=True))


def _size(tensors: Any) -> int:
    """Bytes of all tensors in nested mappings, whole ones where they are shared out."""
    if isinstance(tensors, dict):
        return sum(_size(value) for value in tensors.values())
    return tensors.nbytes if isinstance(tensors, torch.Tensor) else 0


def _forget_old(run: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    whole = folders(run)
    for folder in whole:
        if step_of(folder) > step:  # damaged, or this run would not have gone on from before it
            _discard(folder)
    for folder in [folder for folder in whole if step_of(folder) <= step][:-keep_last]:
        if not (keep_every and step_of(folder) % keep_every == 0):
            _discard(folder)


def _discard(folder: Path) -> None:
    # The mark goes first: a removal that is interrupted leaves nothing that could be taken for whole.
    (folder / MARK).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def last_name(run: Path) -> str:
    whole = folders(run)
    return f"step {step_of(whole[-1])}" if whole else "the beginning"
