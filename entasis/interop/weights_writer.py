"""Writing a safetensors file one tensor at a time.

`safetensors.torch.save_file` needs all tensors in memory at once. The format is a length, a JSON header
and the bytes of the tensors, so writing the header first and then each tensor as it comes keeps the
memory to one tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from entasis.errors import Failure

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write(
    path: Path,
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> str:
    """Writes `tensors`, which come in the order of `described` (name → dtype, size), and syncs the file.

    Returns the file's SHA-256. Raises `Failure` when a tensor is not what was described.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, size) in described.items():
        end = offset + dtype.itemsize * torch.Size(size).numel()
        header[name] = {"dtype": _NAMES[dtype], "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for part in (struct.pack("<Q", len(encoded)), encoded):
            file.write(part)
            digest.update(part)
        for (wanted, (dtype, size)), (name, tensor) in zip(described.items(), tensors, strict=True):
            if (name, tensor.dtype, tuple(tensor.shape)) != (wanted, dtype, size):
                raise Failure(
                    f"{path.name}: {name} came as {tensor.dtype} {tuple(tensor.shape)}, not as described"
                )
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(raw)
            digest.update(raw)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
