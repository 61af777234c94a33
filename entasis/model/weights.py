"""A model as files: `model.safetensors` and `shape.json`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from entasis.errors import UserError
from entasis.model.transformer import Transformer
from entasis.shape.shapes import ModelShape

WEIGHTS, SHAPE = "model.safetensors", "shape.json"


def save(model: Transformer, folder: str | Path) -> None:
    """Writes both files into an existing folder, each aside first, synced and then renamed."""
    folder = Path(folder)
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    for name in (SHAPE, WEIGHTS):
        partial = folder / f"{name}.partial"
        if name == SHAPE:
            partial.write_text(json.dumps(model.shape.to_dict(), indent=1) + "\n", encoding="utf-8")
        else:
            save_file(tensors, partial, metadata={"format": "pt"})
        sync(partial)
        partial.replace(folder / name)


def sync(path: Path) -> None:
    """Makes a file's content survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def load(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
) -> Transformer:
    """The model in a folder, in the dtype it was saved in unless told otherwise.

    Raises `UserError` when a file is missing or damaged, or when tensors and shape do not belong together.
    """
    folder = Path(folder)
    shape = read_shape(folder)
    with torch.device("meta"):
        model = Transformer(shape, attention=attention)  # type: ignore[arg-type]
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            if odd := sorted(set(wanted) ^ set(file.keys())):
                what = "is missing" if odd[0] in wanted else "does not belong to the shape"
                raise UserError(f"{path}: tensor {odd[0]} {what}")
            tensors = {}
            for name, size in wanted.items():
                found = tuple(file.get_slice(name).get_shape())
                if found != size:
                    raise UserError(f"{path}: {name} is {list(found)}, the shape says {list(size)}")
                tensors[name] = file.get_tensor(name) if dtype is None else file.get_tensor(name).to(dtype)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no {WEIGHTS}; is it a finished run or an imported model?") from error
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or cut short ({error})") from error
    model.load_state_dict(tensors, assign=True)
    return model


def read_shape(folder: str | Path) -> ModelShape:
    """The `shape.json` of a folder. Raises `UserError`."""
    path = Path(folder) / SHAPE
    try:
        return ModelShape.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no {SHAPE}; is it a finished run or an imported model?") from error
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"{path}: not a shape ({error})") from error
