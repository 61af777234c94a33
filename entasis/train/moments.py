"""What optimizers remember of each parameter, by its name: between stages, and as `optimizer.safetensors`.

A run never opens another's pickled checkpoints. What goes from one run to the next lies in a safetensors file: tensors
`KEY:PARAMETER` (`exp_avg:blocks.0.attention.query.weight`), and in its metadata the positions in the data and a hash of
both.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from entasis import files
from entasis.errors import Damaged, UserError
from entasis.grow.resize import ResizePlan
from entasis.model import weights
from entasis.train import adapters, sharding

OPTIMIZER = "optimizer.safetensors"
RESTING = "resting.safetensors"
"""In a checkpoint: the moments of what does not learn in its stage, and does in a later one."""
Moments = dict[str, dict[str, torch.Tensor]]
"""Parameter → key (`exp_avg`, `exp_avg_sq`, `momentum_buffer`, `step`) → tensor on the CPU."""


def gather(model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> Moments:
    """The moments of every parameter of the model that has been updated; adapters end with their stage. All ranks call it."""
    states = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    return {
        name: {key: sharding.full(x.detach()).cpu() for key, x in states[p].items()}
        for name, p in model.named_parameters()
        if p in states and not adapters.is_adapter(name)
    }


def put(model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer], found: Moments) -> None:
    """Sets the moments of the parameters that learn; those of others are left.

    Every rank has the moments whole and takes its share. Raises `UserError` for moments of another optimizer or size.
    """
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        muon = not isinstance(optimizer, torch.optim.AdamW)
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            state = found.get(names[p])
            if state is None:
                continue
            if ("momentum_buffer" in state) != muon:
                raise UserError(f"recipe: optimizer_state keep: {names[p]} has moments of another optimizer")
            if any(x.ndim and x.shape != p.shape for x in state.values()):
                raise UserError(f"recipe: optimizer_state keep: the moments of {names[p]} have another size")
            # On a GPU fused AdamW wants its step there too.
            here = {key: x.to(p.device, copy=True) for key, x in state.items()}
            optimizer.state[p] = {key: x if key == "step" else sharding.like(x, p) for key, x in here.items()}


def resized(found: Moments, plan: ResizePlan) -> Moments:
    """The moments of the next model's parameters, taken from where its weights come from; new layers have none."""
    result: Moments = {}
    for name, entry in plan.parameters.items():
        state = None if entry.source is None or plan.is_new(name) else found.get(entry.source)
        if state is not None:
            result[name] = {key: entry.make(x, x, factors=False) if x.ndim else x for key, x in state.items()}
    return result


def save(folder: Path, found: Moments, positions: Mapping[str, int], name: str = OPTIMIZER) -> None:
    """Writes `optimizer.safetensors` into a folder that is this process's own. Raises `DiskFull`."""
    tensors = {f"{key}:{p}": x.contiguous() for p, state in found.items() for key, x in state.items()}
    with files.aside(folder / name, need=sum(x.nbytes for x in tensors.values()), locked=True) as partial:
        # One key: of several, safetensors writes now one first, now another.
        told = {"positions": dict(positions), "content": _content(tensors, positions)}
        save_file(tensors, partial, metadata={weights.BELONGS: json.dumps(told)})


def load(folder: Path, name: str = OPTIMIZER) -> tuple[Moments, dict[str, int]]:
    """(moments, positions in the data) of a finished run or a kept checkpoint.

    Raises `UserError` where there are none, `Damaged` where they are not what was saved.
    """
    path, result = folder / name, Moments()
    try:
        with safe_open(path, framework="pt") as file:
            told = _told(file.metadata())
            tensors = {entry: file.get_tensor(entry) for entry in file.keys()}  # noqa: SIM118  it is no mapping
        positions = {str(k): int(v) for k, v in told["positions"].items()}
    except FileNotFoundError as error:
        raise _missing(folder) from error
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    if "content" in told and told["content"] != _content(tensors, positions):
        raise Damaged(f"damaged: {path} does not hold the moments that were saved; restore it, or use reset")
    for entry, x in tensors.items():
        key, _, parameter = entry.partition(":")
        result.setdefault(parameter, {})[key] = x
    return result, positions


def describe(folder: Path) -> tuple[set[str], dict[str, int]]:
    """The keys of the moments in a folder to start from, and the positions in its data, without reading the moments.

    Raises `UserError` where there are none, `Damaged` where they cannot be read.
    """
    path = folder / OPTIMIZER
    try:
        with safe_open(path, framework="pt") as file:
            return {entry.partition(":")[0] for entry in file.keys()}, _told(file.metadata())["positions"]  # noqa: SIM118
    except FileNotFoundError as error:
        raise _missing(folder) from error
    except _UNREADABLE as error:
        raise _damaged(path, error) from error


_UNREADABLE = (SafetensorError, ValueError, KeyError, TypeError, AttributeError)


def _damaged(path: Path, error: Exception) -> Damaged:
    return Damaged(f"damaged: {path} does not hold an optimizer's moments ({error})")


def _told(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """What stands in the metadata. An earlier version wrote the positions alone, without a hash."""
    found = metadata or {}
    told: dict[str, Any] = json.loads(found.get(weights.BELONGS) or f'{{"positions": {found["positions"]}}}')
    return told


def _missing(folder: Path) -> UserError:
    return UserError(
        f"recipe: start.optimizer_state is keep, but {folder} holds no {OPTIMIZER}; finished runs and kept "
        "checkpoints do (a run with averaged weights in its raw/), imported models do not: use reset"
    )


def _content(tensors: Mapping[str, torch.Tensor], positions: Mapping[str, int]) -> str:
    hashes = [(name, weights.tensor_hash(x)) for name, x in tensors.items()]
    return weights.content_hash([*hashes, ("positions", json.dumps(dict(positions), sort_keys=True))])
