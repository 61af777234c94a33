"""Near-duplicates: which documents belong together, so that a split keeps them on one side.

Two documents are near-duplicates when half or more of their 32-byte shingles together are in both (their Jaccard
similarity), or when half or more of one's are in the other, however long that is (containment). Each document is
reduced to a one-permutation MinHash (Li, Owen and Zhang, 2012), and documents that agree in a whole band of it are
compared; and to those of its shingles whose hash is a multiple of 64 (FracMinHash: Irber and others, 2022), of which
any two documents drew the same. Groups go to one side. The text is not held, only 512 bytes a document and 1/16 of
its bytes. datasketch's MinHash takes forty times as long as both of these, fifteen times where it is handed the hashes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

SHINGLE = 32
"""Bytes in a shingle, white space folded."""
_BINS, _ROWS = 128, 4
_SIMILAR = 0.5
_EMPTY = np.iinfo(np.uint32).max
_ODD = 0x9E3779B97F4A7C15
_INVERSE = pow(_ODD, -1, 1 << 64)


_SHARE = 64
"""One in so many shingles is kept to measure containment."""
_EVIDENCE = 6
"""Kept shingles a document must have for that: about 400 bytes of its own."""
_BOILERPLATE = 16
"""What is contained in more documents than this (a licence) is not held out, rather than joining them all."""


def signature(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The MinHash of a text: uint32 [128]; and its kept shingles, sorted: uint32 [about its bytes / 64]."""
    data = np.frombuffer(b" ".join(text.encode("utf-8").split()), np.uint8)
    result = np.full(_BINS, _EMPTY, np.uint32)
    if len(data) < SHINGLE:
        data = np.pad(data, (0, SHINGLE - len(data)))
    # Rolling polynomial hash of all windows at once: prefix sums of b[j]·p^j, times p^-i, modulo 2^64.
    powers, inverses = _powers(len(data))
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * powers[: len(data)], out=sums[1:])
    hashes = (sums[SHINGLE:] - sums[:-SHINGLE]) * inverses[: len(data) - SHINGLE + 1]
    hashes = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(32)
    bins = (hashes >> np.uint64(57)).astype(np.int64)
    short = (hashes & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    np.minimum.at(result, bins, short)
    kept = (hashes >> np.uint64(40)) % np.uint64(_SHARE) == 0
    return result, np.unique(short[kept])


_tables: list[np.ndarray] = [np.ones(1, np.uint64), np.ones(1, np.uint64)]


def _powers(n: int) -> list[np.ndarray]:
    if len(_tables[0]) < n:
        for i, base in enumerate((_ODD, _INVERSE)):
            steps = np.full(max(n, 1 << 16), base, np.uint64)
            steps[0] = 1
            _tables[i] = np.multiply.accumulate(steps)
    return _tables


def groups(signatures: np.ndarray, kept: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The group of each document, as the index of its first member: int64 [n]; and which are boilerplate: bool [n]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(signatures)
    pairs = [_similar_pairs(signatures)]
    boilerplate = np.zeros(n, bool)
    for i, holders in _containers(kept):
        if len(holders) > _BOILERPLATE:
            boilerplate[i] = True
        else:
            pairs.append(np.stack([np.full(len(holders), i), holders]))
    i, j = np.concatenate(pairs, axis=1)
    _, labels = connected_components(coo_array((np.ones(len(i), bool), (i, j)), (n, n)), directed=False)
    _, first = np.unique(labels, return_index=True)
    return first[labels], boilerplate


def _similar_pairs(signatures: np.ndarray) -> np.ndarray:
    """Documents that agree in a band with its first holder and are similar to it: int64 [2, pairs]."""
    found = [np.zeros((2, 0), np.int64)]
    for start in range(0, _BINS, _ROWS):
        band = np.ascontiguousarray(signatures[:, start : start + _ROWS])
        filled = np.flatnonzero((band != _EMPTY).any(1))
        keys = band[filled].view(f"V{_ROWS * band.itemsize}").reshape(-1)
        _, first, holder = np.unique(keys, return_index=True, return_inverse=True)
        pairs = np.stack([filled[first[holder]], filled])
        found.append(pairs[:, pairs[0] != pairs[1]])
    candidates = np.unique(np.concatenate(found, axis=1), axis=1)
    similar = [_similar(signatures[i], signatures[j]) for i, j in candidates.T]
    return candidates[:, np.array(similar, bool)]


def _containers(kept: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Each document that is contained in others, and those."""
    hashes = np.concatenate([*kept, np.zeros(0, np.uint32)])
    owners = np.repeat(np.arange(len(kept)), [len(k) for k in kept])
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    for i, own in enumerate(kept):
        if len(own) < _EVIDENCE:
            continue
        begin, end = np.searchsorted(hashes, own, "left"), np.searchsorted(hashes, own, "right")
        shared = [owners[a:b] for a, b in zip(begin, end, strict=True) if b - a > 1]
        if len(shared) < _SIMILAR * len(own):
            continue
        holders, common = np.unique(np.concatenate(shared), return_counts=True)
        found = holders[(common >= _SIMILAR * len(own)) & (holders != i)]
        if len(found):
            yield i, found


def _similar(a: np.ndarray, b: np.ndarray) -> bool:
    used = (a != _EMPTY) | (b != _EMPTY)
    return bool((a == b)[used].mean() >= _SIMILAR)
