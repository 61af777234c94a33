"""One basis for the same matrix of all layers, without ever holding more than one of them.

LESA (2502.13794) writes W_1 | … | W_L = U S Vᵀ, an SVD of [M, L·N], so that W_i = (U S) V_i exactly. U and S are the
eigenvectors and the roots of the eigenvalues of Σ W_i W_iᵀ [M, M], which is added up layer by layer in fp64, and
V_i = S⁻¹ Uᵀ W_i. Squaring halves the digits: singular values below 1e-6 of the first are dropped, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import scipy.linalg
import torch

from entasis.errors import UserError

SMALLEST = 1e-6
"""Singular values below this part of the first are dropped."""
CHUNK = 1024
"""Rows of a product that are made at once."""


@dataclass(frozen=True)
class SharedBasis:
    """W_i = factor @ V_i and V_i = inverse @ W_i, for the matrices [M, N] of all layers."""

    factor_MC: torch.Tensor
    """U S, of C kept components; fp64."""
    inverse_CM: torch.Tensor
    """S⁻¹ Uᵀ."""
    dropped: int
    """Components left out."""

    @property
    def components(self) -> int:
        return self.factor_MC.shape[1]


def add_up(matrices: Iterable[torch.Tensor]) -> torch.Tensor:
    """Σ W Wᵀ [M, M], fp64, of which the upper triangle is not to be read. Raises `UserError` for numbers that are not
    finite, and where all are zero."""
    total_MM: torch.Tensor | None = None
    for w_MN in matrices:
        w_MN = w_MN.double()
        if total_MM is None:
            total_MM = w_MN.new_zeros(len(w_MN), len(w_MN))
        for start in range(0, len(w_MN), CHUNK):
            stop = start + CHUNK
            total_MM[start:stop, :stop].addmm_(w_MN[start:stop], w_MN[:stop].T)
    assert total_MM is not None
    if not total_MM.isfinite().all():
        raise UserError("lesa: the model's weights hold numbers that are not finite (NaN or infinity)")
    if not total_MM.any():
        raise UserError("lesa: a matrix is zero in all layers, from which nothing can be predicted")
    return total_MM


def decompose(gram_MM: torch.Tensor) -> SharedBasis:
    """The basis from `add_up`'s sum, which is overwritten. The largest number of each column of U is positive."""
    # Transposed it is in LAPACK's order, so that nothing is copied, and its upper triangle is the one to read.
    squares_M, u_MM = (
        torch.from_numpy(x)
        for x in scipy.linalg.eigh(
            gram_MM.numpy().T, lower=False, overwrite_a=True, check_finite=False, driver="evr"
        )
    )
    s_C, u_MC = squares_M.flip(0).clamp_min(0).sqrt(), u_MM.flip(1)
    kept = int((s_C > SMALLEST * s_C[0]).sum())
    s_C, u_MC = s_C[:kept], u_MC[:, :kept]
    u_MC = u_MC * u_MC.gather(0, u_MC.abs().argmax(0, keepdim=True)).sign()
    return SharedBasis(u_MC * s_C, (u_MC / s_C).T.contiguous(), len(squares_M) - kept)


def identity(size: int) -> SharedBasis:
    """The basis in which V_i is W_i itself, whose matrices have `size` rows."""
    eye_MM = torch.eye(size, dtype=torch.float64)
    return SharedBasis(eye_MM, eye_MM, dropped=0)


def whiten(gram_MM: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    """What makes components [C, N] of a matrix, those of `decompose` up to a rotation, and how many were dropped.

    By Cholesky, which is ten times as fast, for what sees no rotation. Where components may have to be dropped it is
    `decompose`, which overwrites the sum.
    """
    lower_MM, failed = torch.linalg.cholesky_ex(gram_MM)
    if failed or _spread(lower_MM) < 10 * SMALLEST:
        basis = decompose(gram_MM)
        return lambda w_MN: basis.inverse_CM @ w_MN.double(), basis.dropped
    return lambda w_MN: torch.linalg.solve_triangular(lower_MM, w_MN.double(), upper=False), 0


def _spread(lower_MM: torch.Tensor, steps: int = 12) -> float:
    """About the smallest singular value of a triangular matrix as a part of the first, by power iteration.

    The pivots do not tell it: they all lie between the two. From a random start the error is one-sided and has a bound without
    gaps between singular values (Kuczynski & Wozniakowski 1992): after `steps` the result is rarely more than four times too large.
    """
    generator = torch.Generator().manual_seed(0)
    large_M1, small_M1 = torch.randn(2, len(lower_MM), 1, generator=generator, dtype=lower_MM.dtype)
    for _ in range(steps):
        large_M1 = lower_MM.T @ (lower_MM @ (large_M1 / large_M1.norm()))
        half_M1 = torch.linalg.solve_triangular(lower_MM, small_M1 / small_M1.norm(), upper=False)
        small_M1 = torch.linalg.solve_triangular(lower_MM.T, half_M1, upper=True)
    # Each is now a vector of length 1 times about the square of a singular value, or its inverse.
    return float((large_M1.norm() * small_M1.norm()) ** -0.5)
