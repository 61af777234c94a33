"""Size and spectrum of every weight matrix. Needs no text."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from entasis.anatomy.layer_weights import read_matrices
from entasis.anatomy.measures import Row, measure
from entasis.anatomy.subject import Subject


@measure(
    "spectrum",
    kind="structure",
    gives={
        "weight_rms": "root mean square of a matrix's entries",
        "stable_rank": "squared Frobenius norm / squared spectral norm",
        "effective_rank": "exp of the entropy of the singular values as shares (Roy & Vetterli 2007)",
        "spectral_exponent": "Hill estimate of the tail of the squared singular values, upper half of those above "
        "fp32 rounding (2410.10912)",
    },
)
def spectrum(subject: Subject) -> Iterable[Row]:
    for layer in range(subject.n_layers):
        subject.progress(layer, subject.n_layers)
        for name, w in read_matrices(subject.model, layer).items():
            target = name.split(".")[1]
            for quantity, value in describe_spectrum(w).items():
                yield Row(quantity, layer, value, target)
    subject.progress(subject.n_layers, subject.n_layers)


def describe_spectrum(w: torch.Tensor) -> dict[str, float]:
    """The four quantities of one matrix; ranks of a zero matrix are 0, its exponent is NaN."""
    sigma = torch.linalg.svdvals(w.float()).double()
    power = sigma.square()
    rms = float((power.sum() / w.numel()).sqrt())
    if rms == 0:
        return {
            "weight_rms": 0.0,
            "stable_rank": 0.0,
            "effective_rank": 0.0,
            "spectral_exponent": float("nan"),
        }
    share = sigma[sigma > 0] / sigma.sum()
    return {
        "weight_rms": rms,
        "stable_rank": float(power.sum() / power[0]),
        "effective_rank": float((-(share * share.log()).sum()).exp()),
        "spectral_exponent": estimate_exponent(power[sigma > _rounding(sigma, w)]),
    }


def _rounding(sigma: torch.Tensor, w: torch.Tensor) -> float:
    """Singular values up to it are rounding of fp32: those that a matrix of lower rank does not have."""
    return float(sigma[0]) * torch.finfo(torch.float32).eps * max(w.shape)


def estimate_exponent(eigenvalues: torch.Tensor) -> float:
    """1 + k / Σ ln(λ_i / λ_k) over the k largest, k half of them, all above 0; NaN without a spread."""
    largest = eigenvalues.sort(descending=True).values
    k = len(largest) // 2
    if k < 2:
        return float("nan")
    spread = float((largest[:k] / largest[k - 1]).log().sum())
    return 1 + k / spread if spread > 0 else float("nan")
