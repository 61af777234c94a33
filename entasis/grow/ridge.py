"""A matrix from the same matrix of the layers below and above, by ridge regression in closed form.

    predictor = ridge.fit(read, n_layers, split)
    between = predictor(read(4), read(5))

As LESA's network, it learns rows of V_i from [V_{i-1}; V_{i+1}] (`entasis.grow.shared_basis`), but by a matrix B [2N, N]
that minimises Σ ‖V_i − [V_{i-1} V_{i+1}] B‖² + λ‖B‖². As (U S) [V_i V_{i+1}] B = [W_i W_{i+1}] B, the basis is only the
metric of the errors, and any rotation of it gives the same B. λ is chosen by the error on held-out triples: where nothing
can be predicted it is large, and the new layer next to nothing.

For a matrix of N columns the normal equations are four blocks [N, N], made of V_jᵀ V_j, V_jᵀ V_{j+1} and V_jᵀ V_{j+2}: each
is computed once and added wherever a triple has it. At N = 14,336 a block is 0.8 GB in fp32; five are held at once, seven
while a block is factorised, and each strength begins from the blocks in a temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from entasis import files
from entasis.grow import shared_basis
from entasis.grow.shared_basis import CHUNK
from entasis.grow.triples import Split

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""λ, in units of the mean square length of a feature."""
OUTPUTS = 256
"""Most outputs that a strength is chosen by. Each output is a regression of its own, with the same features."""


@dataclass(frozen=True)
class RidgePredictor:
    """below [M, N], above [M, N] → between [M, N]."""

    below_NN: torch.Tensor
    """The upper half of B, which the layer below is multiplied by."""
    above_NN: torch.Tensor
    strength: float
    dropped: int

    def __call__(self, below_MN: torch.Tensor, above_MN: torch.Tensor) -> torch.Tensor:
        return (below_MN.float() @ self.below_NN).addmm_(above_MN.float(), self.above_NN)

    def told(self) -> dict[str, float]:
        """What a report says of the fit."""
        return {"strength": self.strength}


@dataclass
class _Normal:
    """The normal equations: features below (b) and above (a), target (t); all [N, N], fp32. Of the symmetric `bb` and `aa` the
    upper triangle is not to be read."""

    bb: torch.Tensor
    aa: torch.Tensor
    ab: torch.Tensor
    """aᵀ b, the lower left block."""
    bt: torch.Tensor
    at: torch.Tensor


def fit(
    read: Callable[[int], torch.Tensor],
    n_layers: int,
    split: Split,
    *,
    seed: int = 0,
    progress: Callable[[float], None] = lambda part: None,
) -> RidgePredictor:
    """The predictor of one matrix, `read` giving it of any layer; nothing is drawn. `progress` gets the part done."""
    gram_MM = shared_basis.add_up(read(i) for i in range(n_layers))
    components, dropped = shared_basis.whiten(gram_MM)
    del gram_MM
    normal = _accumulate(lambda i: components(read(i)).float(), n_layers, split, progress)
    N = len(normal.bb)
    outputs = torch.linspace(0, N - 1, min(OUTPUTS, N)).long()
    target_NQ = torch.cat([normal.bt[:, outputs], normal.at[:, outputs]])
    with (
        files.temporary_space(12 * N * N),
        tempfile.TemporaryDirectory(prefix="entasis-ridge-") as folder,
    ):
        blocks = _Blocks(Path(folder), N)
        unit = float(normal.bb.diagonal().mean() + normal.aa.diagonal().mean()) / 2
        for name in ("bb", "aa", "ab"):
            blocks.put(name, getattr(normal, name))
            delattr(normal, name)
        tried = []
        for strength in STRENGTHS:
            tried.append(_Factor(blocks, strength * unit).solve(target_NQ))
            progress(0.7 + 0.2 * len(tried) / len(STRENGTHS))
        best = STRENGTHS[_choose(tried, lambda i: components(read(i)).float(), split, outputs)]
        del tried
        factor = _Factor(blocks, best * unit)
    for columns in torch.arange(len(normal.bt)).split(CHUNK):
        solved = factor.solve(torch.cat([normal.bt[:, columns], normal.at[:, columns]]))
        normal.bt[:, columns], normal.at[:, columns] = solved.tensor_split(2)
    progress(1.0)
    return RidgePredictor(normal.bt, normal.at, best, dropped)


def _choose(
    tried: list[torch.Tensor], read: Callable[[int], torch.Tensor], split: Split, outputs: torch.Tensor
) -> int:
    """Which of the solutions [2N, Q] misses the held-out layers' `outputs` least."""
    errors = torch.zeros(len(tried)).double()
    for i in split.held_out:
        below_CN, target_CN, above_CN = (read(i + d) for d in (-1, 0, 1))
        for n, b_NQ in enumerate(tried):
            below_NQ, above_NQ = b_NQ.tensor_split(2)
            missed_CQ = target_CN[:, outputs] - below_CN @ below_NQ - above_CN @ above_NQ
            errors[n] += missed_CQ.double().square().sum()
    return int(errors.argmin())


def _accumulate(
    read: Callable[[int], torch.Tensor], n_layers: int, split: Split, progress: Callable[[float], None]
) -> _Normal:
    trained = set(split.train)
    near: list[torch.Tensor] = []  # the components of this layer, the one before, and the one before that
    normal: _Normal | None = None
    for j in range(n_layers):
        near = [read(j), *near[:2]]
        N = near[0].shape[1]
        if normal is None:
            normal = _Normal(*(torch.zeros(N, N) for _ in range(5)))
        # Layer j lies below the target j + 1, above the target j − 1, and is a target itself.
        below, above, itself = j + 1 in trained, j - 1 in trained, j in trained
        _add(near[0], near[0], [(normal.bb, False)] * below + [(normal.aa, False)] * above)
        if j:
            _add(near[1], near[0], [(normal.bt, False)] * itself + [(normal.at, True)] * above)
        if above:
            _add(near[0], near[2], [(normal.ab, False)])
        progress(0.7 * (j + 1) / n_layers)
    assert normal is not None
    return normal


def _add(x_CN: torch.Tensor, y_CN: torch.Tensor, totals: list[tuple[torch.Tensor, bool]]) -> None:
    """Adds xᵀ y [N, N] to each of the totals, or, where it says so, yᵀ x. Of xᵀ x it is the lower triangle, by chunks."""
    for start in range(0, x_CN.shape[1] if totals else 0, CHUNK):
        rows, columns = slice(start, start + CHUNK), slice(start + CHUNK if x_CN is y_CN else None)
        part_nN = x_CN[:, rows].T @ y_CN[:, columns]
        for total_NN, transposed in totals:
            (total_NN.T if transposed else total_NN)[rows, columns] += part_nN


class _Blocks:
    """Square fp32 matrices kept in files, because every strength begins from them and memory has room for one copy."""

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width = folder, width

    def put(self, name: str, block_NN: torch.Tensor) -> None:
        # numpy's tofile says nothing when the last bytes find no room.
        (self.folder / name).write_bytes(block_NN.numpy().data)

    def get(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.fromfile(self.folder / name, np.float32)).view(self.width, self.width)


class _Factor:
    """Cholesky factors of the normal equations plus `ridge` on the diagonal, block by block."""

    def __init__(self, blocks: _Blocks, ridge: float) -> None:
        self.bb = _root(blocks.get("bb"), ridge)
        self.ab = torch.linalg.solve_triangular(self.bb.T, blocks.get("ab"), upper=True, left=False)
        self.aa = _root(blocks.get("aa").addmm_(self.ab, self.ab.T, alpha=-1), ridge)

    def solve(self, target_NQ: torch.Tensor) -> torch.Tensor:
        """[2N, Q] → [2N, Q]."""
        b_NQ, a_NQ = target_NQ.tensor_split(2)
        b_NQ = torch.linalg.solve_triangular(self.bb, b_NQ, upper=False)
        a_NQ = torch.linalg.solve_triangular(self.aa, a_NQ - self.ab @ b_NQ, upper=False)
        a_NQ = torch.linalg.solve_triangular(self.aa.T, a_NQ, upper=True)
        b_NQ = torch.linalg.solve_triangular(self.bb.T, b_NQ - self.ab.T @ a_NQ, upper=True)
        return torch.cat([b_NQ, a_NQ])


def _root(block_NN: torch.Tensor, ridge: float) -> torch.Tensor:
    block_NN.diagonal().add_(ridge)
    return torch.linalg.cholesky(block_NN)
