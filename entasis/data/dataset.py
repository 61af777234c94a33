"""A corpus cut into sequences: window i is tokens [i·T, i·T + T], one more than the model reads."""

from __future__ import annotations

import numpy as np

from entasis.data.corpus import Corpus


class TokenDataset:
    """The windows of a corpus at one sequence length; neighbours share one token (the last target)."""

    def __init__(self, corpus: Corpus, sequence: int) -> None:
        self.corpus, self.sequence = corpus, sequence
        self._offsets: np.ndarray | None = None

    def __len__(self) -> int:
        return max(0, (self.corpus.tokens - 1) // self.sequence)

    def batch(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of the given windows: int64 [len(indices), sequence + 1]."""
        T = self.sequence
        rows = np.empty((len(indices), T + 1), np.int64)
        for row, i in enumerate(indices):
            rows[row] = self.corpus.read(int(i) * T, int(i) * T + T + 1)
        return rows

    def document_ids(self, indices: np.ndarray) -> np.ndarray:
        """Number of the document that each token belongs to: int64 [len(indices), sequence + 1]."""
        if self._offsets is None:
            self._offsets = self.corpus.document_offsets()
        positions = np.asarray(indices)[:, None] * self.sequence + np.arange(self.sequence + 1)
        return np.searchsorted(self._offsets, positions, side="right") - 1
