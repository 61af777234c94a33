"""In which order windows are read: a permutation that is computed, never stored.

A Feistel network over the smallest even number of bits that holds n, with cycle walking (Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002): numbers that fall outside are encrypted again until they fall
inside. Any position of any epoch is found at once, so a run resumes from one integer, and every rank of any
world size reads its slice of the same order.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6


class Sampler:
    """The order of `n` windows under `seed`; every epoch is another permutation."""

    def __init__(self, n: int, seed: int) -> None:
        assert n > 0
        self.n, self.seed = n, seed
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)

    def indices(self, position: int, count: int) -> np.ndarray:
        """Windows at global positions position … position + count - 1: int64 [count]."""
        result = np.empty(count, np.int64)
        done = 0
        while done < count:
            epoch, place = divmod(position + done, self.n)
            take = min(count - done, self.n - place)
            result[done : done + take] = self._permute(np.arange(place, place + take, dtype=np.uint64), epoch)
            done += take
        return result

    def _permute(self, x: np.ndarray, epoch: int) -> np.ndarray:
        digest = hashlib.blake2b(f"{self.seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        keys = np.frombuffer(digest, "<u8")
        x = self._encrypt(x, keys)
        while (outside := x >= self.n).any():
            x[outside] = self._encrypt(x[outside], keys)
        return x.astype(np.int64)

    def _encrypt(self, x: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << self._half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014); wraps modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
