"""Writing a safetensors file one tensor at a time.

`safetensors.torch.save_file` needs all tensors in memory at once. The format is a length, a JSON header
and the bytes of the tensors, so writing the header first and then each tensor as it comes keeps the
memory to one tensor.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from entasis.errors import Failure
from entasis.files import hash_of
from entasis.model import weights

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write(
    path: Path,
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    beside: Mapping[str, str] | None = None,
) -> str:
    """Writes `tensors`, which come in any order, each once, as `described` (name → dtype, size), and syncs the file.

    The header gets the tensors' hash and those of the files `beside` them, see `entasis.model.weights`. Returns the
    file's SHA-256. Raises `Failure` when a tensor is not what was described.
    """
    blank = "0" * 64
    belongs = json.dumps({weights.CONTENT: blank, **(beside or {})})
    header: dict[str, object] = {"__metadata__": {"format": "pt", weights.BELONGS: belongs}}
    offset, places = 0, {}
    for name, (dtype, size) in described.items():
        places[name] = offset
        end = offset + dtype.itemsize * torch.Size(size).numel()
        header[name] = {"dtype": _NAMES[dtype], "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    hashes = []
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        start = file.tell()
        for name, tensor in tensors:
            if name not in places or described[name] != (tensor.dtype, tuple(tensor.shape)):
                raise Failure(
                    f"{path.name}: {name} came as {tensor.dtype} {tuple(tensor.shape)}, not as described, or twice"
                )
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.seek(start + places.pop(name))
            file.write(raw)
            hashes.append((name, weights.tensor_hash(tensor)))
        if places:
            raise Failure(f"{path.name}: {next(iter(places))} did not come")
        # The hash stands before what it is a hash of.
        file.seek(8 + encoded.index(blank.encode()))
        file.write(weights.content_hash(hashes).encode())
        file.flush()
        os.fsync(file.fileno())
    return hash_of(path)
