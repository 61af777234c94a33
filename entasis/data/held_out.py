"""Which documents of a held-out corpus are scored.

Documents are known by the hash of their text, so that corpora of one text under two tokenizers give the same ones.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from entasis.data.corpus import Corpus
from entasis.errors import UserError

Part = Literal["all", "selection", "test"]
"""`selection` is a third of the documents, drawn by hash, to choose settings by; `test` is the others."""


def choose_documents(
    corpus: Corpus, max_tokens: int | None = None, *, max_bytes: int | None = None, part: Part = "all"
) -> np.ndarray:
    """Ascending document numbers: all of the part, or a fixed random choice up to a limit (at least one).

    Up to `max_tokens` the choice is this corpus's own; up to `max_bytes` of text it is the same under every tokenizer.
    Raises `UserError` for a corpus of too few documents.
    """
    among = _part(corpus, part)
    if max_bytes is not None:
        shuffled = among[np.argsort(corpus.document_hashes[among], kind="stable")]
        sizes = corpus.document_bytes()[shuffled]
        limit = max_bytes
    else:
        sizes = np.diff(corpus.document_offsets())[among]
        if max_tokens is None or sizes.sum() <= max_tokens:
            return among
        order = np.random.default_rng(0).permutation(len(among))
        shuffled, sizes, limit = among[order], sizes[order], max_tokens
    fitting = np.searchsorted(np.cumsum(sizes), limit, side="right")
    return np.sort(shuffled[: max(1, fitting)])


def _part(corpus: Corpus, part: Part) -> np.ndarray:
    if part == "all":
        return np.arange(corpus.documents)
    if corpus.documents < 2:
        raise UserError(
            f"{corpus.path}: one document cannot be divided into a selection and a test part; hold out more text"
        )
    order = np.argsort(corpus.document_hashes, kind="stable")
    third = max(1, round(len(order) / 3))
    return np.sort(order[:third] if part == "selection" else order[third:])
