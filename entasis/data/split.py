"""Which documents are held out: whole groups of near-duplicates, drawn by name and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def draw_held_out(
    names: Sequence[str],
    sizes: np.ndarray,
    group: np.ndarray,
    boilerplate: np.ndarray,
    share: float,
    seed: int,
) -> np.ndarray:
    """Which documents are held out: bool [n], whole groups up to `share` of all bytes, at least one group.

    The order in which groups are drawn depends on names and seed alone.
    """
    total = np.bincount(group, weights=sizes, minlength=len(group))
    leaders = np.setdiff1d(group, group[boilerplate])
    drawn = sorted(leaders, key=lambda i: hash_of(names[i], seed))
    left, chosen = share * float(sizes.sum()), np.zeros(len(group), bool)
    for leader in drawn:
        if total[leader] <= left:
            chosen[leader] = True
            left -= total[leader]
    if share > 0 and len(leaders) > 1 and not chosen.any():
        chosen[min(drawn, key=lambda i: total[i])] = True
    return chosen[group]


def hash_of(name: str, seed: int) -> int:
    """A number for a name, the same everywhere."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed}/{name}".encode(errors="surrogateescape"), digest_size=8).digest(), "little"
    )
