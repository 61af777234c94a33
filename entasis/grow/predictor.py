"""LESA's network (2502.13794): a matrix from the same matrix of the layers below and above, row by row of V.

    predictor = fit(read, n_layers, split, NetworkSettings(), seed=0)
    between = predictor(read(4), read(5))

An MLP 2N → 256 → 256 → N with ReLU is shown rows of [V_{i-1}; V_{i+1}] (`entasis.grow.shared_basis`) and taught the row of
V_i. The loss is (1 − λ) · mean squared error + λ · norm loss. Learnt at distance two, it is asked at distance one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from entasis import files
from entasis.grow import shared_basis
from entasis.grow.network_settings import NetworkSettings
from entasis.grow.shared_basis import SharedBasis
from entasis.grow.triples import Split


class NetworkPredictor:
    """below [M, N], above [M, N] → between [M, N]."""

    def __init__(
        self, basis: SharedBasis, network: nn.Module, epochs: int, losses: tuple[float, float]
    ) -> None:
        self.basis, self.network, self.dropped = basis, network, basis.dropped
        self.epochs, self.losses = epochs, losses

    @torch.no_grad()
    def __call__(self, below_MN: torch.Tensor, above_MN: torch.Tensor) -> torch.Tensor:
        near = [(self.basis.inverse_CM @ w.double()).float() for w in (below_MN, above_MN)]
        return (self.basis.factor_MC @ self.network(torch.cat(near, dim=1)).double()).float()

    def told(self) -> dict[str, float]:
        """What a report says of the fit."""
        return {"epochs": self.epochs, "loss": self.losses[0], "held_out_loss": self.losses[1]}


def fit(
    read: Callable[[int], torch.Tensor],
    n_layers: int,
    split: Split,
    settings: NetworkSettings,
    *,
    seed: int,
    progress: Callable[[float], None] = lambda part: None,
) -> NetworkPredictor:
    """The predictor of one matrix, `read` giving it of any layer.

    The components V of all layers are kept in a temporary file, from which rows are read at random. `progress` gets
    the part done.
    """
    gram_MM = shared_basis.add_up(read(i) for i in range(n_layers))
    basis = (
        shared_basis.identity(len(gram_MM)) if settings.basis == "none" else shared_basis.decompose(gram_MM)
    )
    C, N = basis.components, read(0).shape[1]
    with files.temporary_space(4 * n_layers * C * N), tempfile.TemporaryFile() as file:
        for i in range(n_layers):
            v_CN = (basis.inverse_CM @ read(i).double()).float()
            file.write(v_CN.numpy().data)
        file.flush()
        rows = np.memmap(file, np.float32, "r", shape=(n_layers, C, N))
        network, epochs, losses = _train(rows, split, settings, seed, progress)
        del rows
    return NetworkPredictor(basis, network, epochs, losses)


def _train(
    rows_LCN: np.memmap, split: Split, settings: NetworkSettings, seed: int, progress: Callable[[float], None]
) -> tuple[nn.Module, int, tuple[float, float]]:
    """The network of the best epoch, that epoch, and its loss on what was learnt from and what was held out."""
    C, N = rows_LCN.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(2 * N, settings.hidden),
            nn.ReLU(),
            nn.Linear(settings.hidden, settings.hidden),
            nn.ReLU(),
            nn.Linear(settings.hidden, N),
        )
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr)
    middles = torch.tensor(split.train)
    best, state, epoch = (float("inf"), float("inf"), 0), {}, 0
    for epoch in range(1, settings.epochs + 1):
        total = 0.0
        chunks = torch.randperm(len(middles) * C, generator=generator).split(settings.batch)
        for n, chunk in enumerate(chunks):
            loss = _loss(network, rows_LCN, middles[chunk // C], chunk % C, settings)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chunk)
            if n % 50 == 0:
                progress((epoch - 1 + n / len(chunks)) / settings.epochs)
        held = _score(network, rows_LCN, split.held_out, settings)
        if held < best[0] or not settings.patience:
            best = (held, total / (len(middles) * C), epoch)
            state = {name: x.clone() for name, x in network.state_dict().items()}
        elif epoch - best[2] >= settings.patience:
            break
    network.load_state_dict(state)
    progress(1.0)
    return network, best[2], (best[1], best[0])


def _loss(
    network: nn.Module, rows_LCN: np.memmap, layer: torch.Tensor, row: torch.Tensor, settings: NetworkSettings
) -> torch.Tensor:
    # As arrays: a tensor of one number would be taken for that number, and a row come without its axis.
    i, r = layer.numpy(), row.numpy()
    below, target, above = (torch.from_numpy(rows_LCN[i + d, r]) for d in (-1, 0, 1))
    out = network(torch.cat([below, above], dim=1))
    error = (out - target).square().mean()
    if settings.norm_loss == "none":
        return error
    dims = None if settings.norm_loss == "batch" else 1
    lengths = torch.linalg.vector_norm(out, dim=dims) - torch.linalg.vector_norm(target, dim=dims)
    return (1 - settings.norm_weight) * error + settings.norm_weight * lengths.square().mean()


@torch.no_grad()
def _score(
    network: nn.Module, rows_LCN: np.memmap, middles: tuple[int, ...], settings: NetworkSettings
) -> float:
    """Mean loss over whole held-out triples, in batches as in training."""
    total, C = 0.0, rows_LCN.shape[1]
    for i in middles:
        for row in torch.arange(C).split(settings.batch):
            total += _loss(network, rows_LCN, torch.full_like(row, i), row, settings).item() * len(row)
    return total / (len(middles) * C)
