"""Manipulation robustness: the matrices of one layer are changed in a named, seeded way, and the loss is measured."""

from __future__ import annotations

from collections.abc import Callable

import torch

from entasis.anatomy.interventions import Change, Layer, intervention

MatrixChange = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
"""A matrix [out, in] and random numbers → the changed matrix."""


def manipulation(name: str, says: str) -> Callable[[MatrixChange], MatrixChange]:
    """Registers a change of every matrix of a layer; norms and biases stay."""

    def add(change: MatrixChange) -> MatrixChange:
        @intervention(name, kind="manipulation", says=f"the layer's matrices are {says}")
        def change_matrices(layer: Layer) -> Change:
            return {n: change(w, layer.generator(name, n)) for n, w in layer.matrices.items()}

        return change

    return add


@manipulation("scale_0.9", "multiplied by 0.9")
def scale_down(w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return w * 0.9


@manipulation("scale_1.1", "multiplied by 1.1")
def scale_up(w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return w * 1.1


@manipulation("noise_10", "given noise of a tenth of their norm")
def noise(w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return w + 0.1 * noise_like(w, generator)


@manipulation("quantise_4", "rounded to 4 bits, each row on a scale of its own")
def quantise(w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Symmetric, to the nearest of −7 … 7."""
    step = w.abs().amax(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny) / 7
    return (w / step).round() * step


@manipulation("low_rank", "cut to half their rank")
def low_rank(w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    u, sigma, v = torch.linalg.svd(w.float(), full_matrices=False)
    rank = max(1, len(sigma) // 2)
    return ((u[:, :rank] * sigma[:rank]) @ v[:rank]).to(w.dtype)


@manipulation("sign_transpose", "given the signs of their transpose, magnitudes kept")
def sign_transpose(w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The transpose's signs are laid out in the matrix's shape, row by row."""
    return w.abs() * w.T.reshape(w.shape).sign()


def noise_like(w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gaussian noise of the same Frobenius norm."""
    drawn = torch.randn(w.shape, generator=generator).to(w)
    return drawn * (w.norm() / drawn.norm())
