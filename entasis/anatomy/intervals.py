"""Intervals and p-values of changes in loss: paired over documents, bootstrap-t, Holm over layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import stats

from entasis.anatomy.measures import Row

DRAWS = 9_999
FEWEST = 4
"""Documents. Of fewer, more than one resample in twenty is one document only, whose spread is unknown: no interval ends."""


@dataclass(frozen=True)
class LossChange:
    """Nats per token, one entry for each layer; NaN where there is no value or, of too few documents, no interval."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    """Two-sided, against no difference, adjusted by Holm over the layers."""

    def row(
        self, entry: int, quantity: str, layer: int | None, target: str = "", *, test: bool = False
    ) -> Row:
        """One entry as a row of the frame, with its p-value if `test`."""
        numbers = (float(x[entry]) for x in (self.low, self.high, *([self.p] if test else [])))
        return Row(quantity, layer, float(self.value[entry]), target, *numbers)


def loss_change(changed: np.ndarray, clean: np.ndarray, tokens: np.ndarray, *, seed: int = 0) -> LossChange:
    """The change in nats per token, from nats per document: changed [L, documents], clean [documents].

    A ratio of sums, Σ (changed − clean) / Σ tokens, resampled by document. Its t-value is bootstrapped rather than the
    ratio itself (symmetric bootstrap-t, Hall 1988), as with ten documents the plain percentile interval is too narrow.
    """
    from statsmodels.stats.multitest import multipletests

    gain_LN = changed - clean
    used = ~np.isnan(gain_LN).any(1)
    empty = np.full(len(gain_LN), np.nan)
    result = LossChange(empty.copy(), empty.copy(), empty.copy(), empty.copy())
    if not used.any():
        return result
    kept_LN, n_N = gain_LN[used], tokens.astype(float)
    value_L, error_L = _ratio(np.ones((1, len(n_N))), kept_LN, n_N)
    value_L, error_L = value_L[0], error_L[0]
    result.value[used] = value_L
    if len(n_N) < FEWEST:
        return result
    t_RL = np.concatenate(
        [np.abs(v - value_L) / e for v, e in _resampled(kept_LN, n_N, np.random.default_rng(seed))]
    )
    # A resample of one document only has no spread: its t is unknown and counts as extreme.
    t_RL = np.where(np.isfinite(t_RL), t_RL, np.inf)
    reach_L = np.quantile(t_RL, 0.95, axis=0, method="higher")
    reach_L = np.where(error_L > 0, reach_L * np.where(error_L > 0, error_L, 1.0), 0.0)
    # Documents without a token are in resamples too, so even of many the interval may have no end.
    ends_L = np.isfinite(reach_L)
    reach_L = np.where(ends_L, reach_L, np.nan)
    result.low[used], result.high[used] = value_L - reach_L, value_L + reach_L
    with np.errstate(divide="ignore", invalid="ignore"):
        seen_L = np.where(error_L > 0, np.abs(value_L) / error_L, 0.0)
    p_L = (1 + (t_RL >= seen_L).sum(0)) / (len(t_RL) + 1)
    result.p[used] = np.where(ends_L, multipletests(p_L, method="holm")[1], np.nan)
    return result


def _ratio(weights_RN: np.ndarray, gain_LN: np.ndarray, n_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Σ w gain / Σ w n and its standard error (linearised), [R, L] each."""
    size_R1 = (weights_RN @ n_N)[:, None]
    value_RL = weights_RN @ gain_LN.T / size_R1
    square_RL = (
        weights_RN @ (gain_LN**2).T
        - 2 * value_RL * (weights_RN @ (gain_LN * n_N).T)
        + value_RL**2 * (weights_RN @ n_N**2)[:, None]
    )
    documents = len(n_N)
    return value_RL, np.sqrt(np.maximum(square_RL, 0) * documents / (documents - 1 or 1)) / size_R1


def _resampled(
    gain_LN: np.ndarray, n_N: np.ndarray, random: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(value, standard error) of resamples, some hundred at a time to bound memory."""
    documents = len(n_N)
    even = np.full(documents, 1 / documents)
    with np.errstate(divide="ignore", invalid="ignore"):
        for start in range(0, DRAWS, 500):
            draws = min(500, DRAWS - start)
            yield _ratio(random.multinomial(documents, even, draws).astype(float), gain_LN, n_N)


def change_by_chance(untrained: np.ndarray) -> float:
    """The change, in nats per token, that one of the layers of an untrained model shows with probability 0.05.

    Of two random functions one has the lower loss, on enough text with certainty, without any layer doing harm. `untrained`
    are the changes of such a model's layers, NaN where there is none: their mean is zero by symmetry, so t times their root
    mean square bounds all of them at once (Bonferroni).
    """
    seen = untrained[~np.isnan(untrained)]
    if not len(seen):
        return 0.0
    return float(stats.t.ppf(1 - 0.025 / len(seen), len(seen)) * np.sqrt(np.mean(seen**2)))


def find_harmful(value: np.ndarray, p: np.ndarray, by_chance: float) -> np.ndarray:
    """bool [L]: the loss is lower without the layer, with p < 0.05 after Holm and by more than an untrained layer shows."""
    return (value < -by_chance) & (p < 0.05)


def correlate_ranks(a: np.ndarray, b: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Spearman's rho of two measures over layers, with a 95 % interval (percentile bootstrap over layers)."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan"), float("nan"), float("nan")
    rho = float(stats.spearmanr(a, b).statistic)
    chosen = np.random.default_rng(seed).integers(0, len(a), (1000, len(a)))
    # Ranks within each resample; a constant resample has no rank correlation and is left out.
    x, y = stats.rankdata(a[chosen], axis=1), stats.rankdata(b[chosen], axis=1)
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return rho, float(low), float(high)
