"""Similarity of the residual stream behind any two layers: linear CKA."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from entasis.anatomy.layer_sweep import walk_layers
from entasis.anatomy.measures import Row, measure
from entasis.anatomy.subject import Subject

TOKENS = 256
"""Tokens compared at a time, spread over the batch; their Gram matrices are all that is kept."""
BATCHES = 64


@measure(
    "similarity",
    kind="structure",
    gives={"cka": "linear CKA of the streams behind two layers, unbiased HSIC over minibatches (2010.15327)"},
)
def similarity(subject: Subject) -> Iterable[Row]:
    """1 is the same up to rotation and scale. The target is the other layer."""
    L = subject.n_layers
    total_LL = torch.zeros(L, L, dtype=torch.float64)
    for batch in subject.batches():
        n = batch.tokens_BT.numel()
        if batch.number >= BATCHES or n < 8:
            continue
        chosen = torch.linspace(0, n - 1, min(TOKENS, n), device=subject.device).long()
        grams = []
        for _, _, y_BTD in walk_layers(subject, batch):
            y_nD = y_BTD.flatten(0, 1)[chosen].double()
            grams.append((y_nD @ y_nD.T).cpu())
        total_LL += estimate_hsic(torch.stack(grams))
    size_L = total_LL.diagonal().clamp_min(0).sqrt()
    cka_LL = total_LL / (size_L[:, None] * size_L)
    for i in range(L):
        for j in range(L):
            yield Row("cka", i, float(cka_LL[i, j]), str(j))


def estimate_hsic(gram_Lnn: torch.Tensor) -> torch.Tensor:
    """Unbiased HSIC (Song et al. 2012, eq. 5) of every pair of Gram matrices [L, n, n], n ≥ 4: [L, L]."""
    n = gram_Lnn.shape[1]
    k_Lnn = gram_Lnn - torch.diag_embed(gram_Lnn.diagonal(dim1=1, dim2=2))
    rows_Ln = k_Lnn.sum(2)
    sums_L = rows_Ln.sum(1)
    flat = k_Lnn.flatten(1)
    trace_LL = flat @ flat.T
    means_LL = sums_L[:, None] * sums_L / ((n - 1) * (n - 2))
    cross_LL = rows_Ln @ rows_Ln.T * 2 / (n - 2)
    return (trace_LL + means_LL - cross_LL) / (n * (n - 3))
