"""The outputs of the frozen layers at the bottom of a model, kept on disk by window while a stage trains those above.

A stage that reads its windows more than once computes the frozen layers once for each. The file is scratch: a run that
goes on begins it anew. It holds the residual stream as it is, in fp32, so losses are those without it, to the bit.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import numpy as np
import torch

from entasis import files
from entasis.train import parallel

NAME = "frozen-outputs-{rank}.scratch"


def path_in(folder: Path) -> Path:
    """Where this process keeps them in a run's folder."""
    return folder / NAME.format(rank=parallel.rank())


class FrozenOutputs:
    """Residual streams [T, D] by the number of their window. Raises `DiskFull` where they do not fit on the disk."""

    def __init__(self, folder: Path, *, windows: int, read: int, sequence: int, width: int) -> None:
        """Of so many `windows` of the text at most `read` will be asked for."""
        self.path = path_in(folder)
        self.path.unlink(missing_ok=True)
        need = 4 * min(windows, read) * sequence * width
        if shutil.disk_usage(folder).free < need:
            full = OSError(errno.ENOSPC, "cache_frozen")
            raise files.no_space(self.path, full, need=need, then="give the same command")
        self._kept_NTD = np.memmap(self.path, np.float32, mode="w+", shape=(windows, sequence, width))
        self._is_kept = np.zeros(windows, bool)

    def get(self, windows: np.ndarray, device: torch.device) -> torch.Tensor | None:
        """x [B, T, D] of these windows; None where one of them is not there yet."""
        if not self._is_kept[windows].all():
            return None
        return torch.from_numpy(np.ascontiguousarray(self._kept_NTD[windows])).to(device)

    def put(self, windows: np.ndarray, x_BTD: torch.Tensor) -> None:
        """Keeps the streams of these windows."""
        assert x_BTD.dtype == torch.float32, "the stream is summed in fp32"
        self._kept_NTD[windows] = x_BTD.cpu().numpy()
        self._is_kept[windows] = True

    def close(self) -> None:
        """Removes the file."""
        del self._kept_NTD
        self.path.unlink(missing_ok=True)
