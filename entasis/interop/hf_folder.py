"""Reading a Hugging Face checkpoint folder: `config.json` and safetensors, whole or in shards.

Nothing is unpickled and no code of the folder is run. File names come from a stranger's index, so only
regular files of the folder itself are opened; the one kind of link followed is that of the Hugging Face
cache, whose `snapshots/REVISION/*` point into its `blobs/`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from entasis.errors import UserError
from entasis.interop.config_reader import ConfigReader, shorten

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_JSON = 64 * 2**20
_MOST_HEADER = 16 * 2**20
"""Bytes of a safetensors header; real ones have some hundred thousand."""
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class HFFolder:
    """An opened checkpoint folder: its config, and where each tensor is.

    Raises `UserError` for missing or damaged files, names that leave the folder, and tensors that are
    there twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = ConfigReader(read_json(find_member(path, "config.json")), "config.json")
        self.files = [find_member(path, name) for name in self._shards()]
        self.sizes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Path] = {}
        for file in self.files:
            self._open(file)
        self._check_index()

    def _shards(self) -> list[str]:
        index = self.path / INDEX
        self._weight_map: dict[str, str] = {}
        if (self.path / WHOLE).exists() or not index.exists():
            if not (self.path / WHOLE).exists():
                if any(self.path.glob("*.bin")) or any(self.path.glob("*.pt*")):
                    raise UserError(
                        f"{self.path.name}: has only pickled weights, which could run code; "
                        "save the model as safetensors first"
                    )
                raise UserError(f"{self.path.name}: has neither {WHOLE} nor {INDEX}")
            return [WHOLE]
        weight_map = read_json(find_member(self.path, INDEX)).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise UserError(f"{INDEX}: weight_map is not a mapping of tensors to files")
        self._weight_map = weight_map
        return sorted(set(weight_map.values()))

    def _open(self, file: Path) -> None:
        described, before = _described(file), len(self.sizes)
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (not a dict)
                    if not name.isprintable() or not name:
                        raise UserError(f"{file.name}: tensor {shorten(name)!r} has no printable name")
                    if name in self._files:
                        raise UserError(f"{file.name}: tensor {shorten(name)} is in another shard too")
                    part = handle.get_slice(name)
                    if part.get_dtype() not in _DTYPES:
                        found = f"tensor {shorten(name)} is {part.get_dtype()}"
                        raise UserError(f"{file.name}: {found}; weights must be F32, F16 or BF16")
                    self.sizes[name] = tuple(part.get_shape())
                    self._dtypes[name] = _DTYPES[part.get_dtype()]
                    self._files[name] = file
        except (SafetensorError, OSError, OverflowError) as error:
            raise UserError(f"{file.name}: is not a whole safetensors file ({_line(error)})") from None
        if described > len(self.sizes) - before:
            raise UserError(f"{file.name}: describes a tensor twice")

    def _check_index(self) -> None:
        if self._weight_map and (odd := set(self._weight_map) ^ set(self.sizes)):
            name = min(odd)
            place = (
                "the index but in no shard" if name in self._weight_map else "a shard but not in the index"
            )
            raise UserError(f"{INDEX}: tensor {shorten(name)!r} is in {place}")

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor is stored in."""
        return self._dtypes[name]

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its own dtype."""
        # Opened anew each time: one mapping kept open would come to hold the whole file in memory.
        with safe_open(self._files[name], framework="pt") as handle:
            return handle.get_tensor(name)

    def close(self) -> None:
        """Nothing is held between reads."""


def _described(file: Path) -> int:
    """How many tensors the header describes, counting those that are described twice.

    safetensors checks sizes, offsets and overlaps, but takes the last of two equal names. Raises
    `UserError` for a header that is longer than the file or than any real one.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise UserError(
                f"{file.name}: is not a whole safetensors file (its header would be {length} bytes)"
            )
        header = opened.read(length)
    return header.count(b'"data_offsets"')


def find_member(folder: Path, name: str) -> Path:
    """The regular file `name` of `folder`. Raises `UserError` for names that lead anywhere else."""
    plain = name.isprintable() and "\\" not in name and name not in ("", ".", "..")
    if not plain or name != Path(name).name:
        raise UserError(
            f"{folder.name}: file name {shorten(name)!r} is no plain name of a file in the folder"
        )
    if len(name.encode(errors="replace")) > 255:
        raise UserError(f"{folder.name}: file name {shorten(name)!r} is longer than any file's")
    path = folder / name
    if not path.exists():
        raise UserError(f"{folder.name}: {name} is missing")
    target, home = path.resolve(), folder.resolve()
    cached = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if target.parent != home and not cached:
        raise UserError(f"{folder.name}: {name} is a link out of the folder; it must be a file in it")
    if not target.is_file():
        raise UserError(f"{folder.name}: {name} is not a regular file")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping, of at most 64 MB. Raises `UserError` for any other."""
    if path.stat().st_size > _MOST_JSON:
        raise UserError(f"{path.name}: is larger than {_MOST_JSON >> 20} MB")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name}: is not JSON ({_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path.name}: holds a {type(content).__name__} where a mapping is needed")
    return content


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
