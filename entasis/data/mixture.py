"""Windows of several corpora, mixed by weight: which corpus window n comes from, and which of its windows it is.

Both follow from weights, seed and n alone, so the position in a mixture is one integer and the order is the same at any
world size. All windows have equally many tokens, so shares of windows are shares of tokens. After any number n of
windows each corpus has given its share of n to within less than one window. Such a sequence exists for all shares
(Tijdeman, "The chairman assignment problem", 1980): with whole numbers c_1 … c_k of windows in a period of P, the j-th
window of corpus i may come from place floor((j - 1)·P/c_i) + 1 on and must come by ceil(j·P/c_i), and taking what is
due first finds it (Steiner and Yeomans, "Level schedules for mixed-model, just-in-time processes", 1993).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from entasis.data.dataset import TokenDataset
from entasis.data.sampler import Sampler
from entasis.errors import UserError

LONGEST_PERIOD = 100_000
"""Windows after which the sequence of corpora begins again, at most."""


@dataclass(frozen=True)
class Part:
    """One corpus of a mixture."""

    name: str
    dataset: TokenDataset
    weight: float = 1.0


class Mixture:
    """The windows of a stretch of training, from its first at position 0; one part is an ordinary corpus.

    `begins` says how many windows of each part were read before that stretch, 0 where it is left out.
    """

    def __init__(self, parts: Sequence[Part], seed: int) -> None:
        self.parts = tuple(parts)
        self.begins = [0] * len(parts)
        self._ends = np.cumsum([len(part.dataset) for part in parts])
        self._samplers = [Sampler(len(part.dataset), seed) for part in parts]
        names = [part.name for part in parts]
        drawn = sorted(names, key=lambda name: hashlib.blake2b(f"{seed}/{name}".encode()).digest())
        counts = whole_shares({part.name: part.weight for part in parts})
        self._period_P = interleave(
            [counts[name] for name in names], first=[drawn.index(name) for name in names]
        )
        chosen_PK = self._period_P[:, None] == np.arange(len(parts))
        self._given_PK = np.concatenate([np.zeros((1, len(parts)), np.int64), np.cumsum(chosen_PK, axis=0)])

    def counts(self, windows: int) -> list[int]:
        """How many of the first `windows` come from each part."""
        periods, rest = divmod(windows, len(self._period_P))
        return (periods * self._given_PK[-1] + self._given_PK[rest]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def windows(self, position: int, count: int) -> np.ndarray:
        """The windows at position … position + count - 1, by number when all parts are laid end to end: int64 [count]."""
        sources = self._period_P[np.arange(position, position + count) % len(self._period_P)]
        result = np.empty(count, np.int64)
        before, after = self.counts(position), self.counts(position + count)
        for i, sampler in enumerate(self._samplers):
            begin = self.begins[i] + before[i]
            result[sources == i] = self._first(i) + sampler.indices(begin, after[i] - before[i])
        return result

    def batch(self, windows: np.ndarray) -> np.ndarray:
        """The tokens of these windows: int64 [len(windows), sequence + 1]."""
        return self._gathered(windows, lambda dataset, chosen: dataset.batch(chosen))

    def document_ids(self, windows: np.ndarray) -> np.ndarray:
        """Number, within its corpus, of the document that each token belongs to: int64 [len(windows), sequence + 1]."""
        return self._gathered(windows, lambda dataset, chosen: dataset.document_ids(chosen))

    def _first(self, part: int) -> int:
        """The number of a part's first window."""
        return int(self._ends[part]) - len(self.parts[part].dataset)

    def _gathered(
        self, windows: np.ndarray, read: Callable[[TokenDataset, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        rows = np.empty((len(windows), self.parts[0].dataset.sequence + 1), np.int64)
        sources = np.searchsorted(self._ends, windows, side="right")
        for i in np.unique(sources):
            rows[sources == i] = read(self.parts[i].dataset, windows[sources == i] - self._first(i))
        return rows


def whole_shares(weights: Mapping[str, float]) -> dict[str, int]:
    """The weights as the smallest whole numbers in the same proportions. Raises `UserError` where they are too large."""
    exact = {name: Fraction(repr(weight)) for name, weight in weights.items()}
    unit = math.lcm(*(x.denominator for x in exact.values()))
    numbers = {name: int(x * unit) for name, x in exact.items()}
    divisor = math.gcd(*numbers.values())
    period = sum(numbers.values()) // divisor
    if period > LONGEST_PERIOD:
        told = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
        raise UserError(
            f"weights {told}: in whole numbers they add up to {period:,}; give them fewer digits "
            f"(at most {LONGEST_PERIOD:,})"
        )
    return {name: number // divisor for name, number in numbers.items()}


def interleave(counts: Sequence[int], first: Sequence[int]) -> np.ndarray:
    """One period: which part each window comes from, part i counts[i] times: int64 [sum(counts)].

    Where several are due at once, the one with the lowest `first` comes first.
    """
    period = sum(counts)
    given = [0] * len(counts)
    result = np.empty(period, np.int64)
    for place in range(1, period + 1):
        due = min(
            (-(-(given[i] + 1) * period // count), first[i], i)
            for i, count in enumerate(counts)
            if given[i] < count and given[i] * period // count < place
        )
        result[place - 1] = due[2]
        given[due[2]] += 1
    return result
