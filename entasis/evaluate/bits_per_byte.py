"""Bits per byte: the one number that compares models with different tokenizers.

    bits per byte = Σ nll / (bytes · ln 2)

The nll (nats) is summed over *every* token, end-of-text tokens included; bytes are those of the documents'
UTF-8 text. The corpus is read as one stream with an end-of-text token before it, cut into windows of
`sequence` tokens that do not overlap, so a token sees between 0 and `sequence − 1` tokens before it, as in
training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from entasis.data.corpus import Corpus
from entasis.model.transformer import Transformer

_LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class Score:
    """What was measured, document by document; all else follows from the three arrays."""

    document_nll: np.ndarray
    """float64 [documents], nats."""
    document_bytes: np.ndarray
    """int64 [documents], UTF-8."""
    document_tokens: np.ndarray
    """int64 [documents], end-of-text included."""

    @property
    def nll_sum(self) -> float:
        return float(self.document_nll.sum())

    @property
    def bytes(self) -> int:
        return int(self.document_bytes.sum())

    @property
    def tokens(self) -> int:
        return int(self.document_tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        return self.nll_sum / (self.bytes * math.log(2))

    @property
    def perplexity(self) -> float:
        """Per token; only comparable under the same tokenizer."""
        return math.exp(min(self.nll_sum / self.tokens, 700.0))


def choose_documents(corpus: Corpus, max_tokens: int | None) -> np.ndarray:
    """Ascending document numbers: all, or a fixed random choice up to `max_tokens` (at least one)."""
    sizes = np.diff(corpus.document_offsets())
    if max_tokens is None or sizes.sum() <= max_tokens:
        return np.arange(len(sizes))
    shuffled = np.random.default_rng(0).permutation(len(sizes))
    fitting = np.searchsorted(np.cumsum(sizes[shuffled]), max_tokens, side="right")
    return np.sort(shuffled[: max(1, fitting)])


@torch.no_grad()
def evaluate(
    model: Transformer,
    corpus: Corpus,
    *,
    sequence: int,
    batch: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    max_tokens: int | None = None,
    document_masking: bool = False,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Scores whole documents of `corpus`, `batch` windows of `sequence` tokens at a time.

    Under several ranks each scores every world-th batch; the sum of their `document_nll` is the whole.
    `progress(done, total)` is called with numbers of tokens.
    """
    offsets = corpus.document_offsets()
    chosen = choose_documents(corpus, max_tokens)
    sizes = np.diff(offsets)[chosen]
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    nll = np.zeros(len(chosen))
    read = _stream(corpus, offsets, chosen)
    was_training = model.training
    model.eval()
    # Without an end-of-text token there is nothing to predict the first token from: token 0 stands in.
    first = 0 if corpus.end_of_text is None else corpus.end_of_text
    step = sequence * batch
    for start in range(rank * step, total, world * step):
        stop = min(start + step, total)
        stream = read(max(0, start - 1), stop).astype(np.int64)
        if start == 0:
            stream = np.concatenate([[first], stream])
        owner = np.searchsorted(ends, np.arange(start, stop), side="right")
        for a, b in _windows(stop - start, sequence):
            tokens_BT = torch.from_numpy(stream[a:b].reshape(-1, min(sequence, b - a)))
            targets_BT = torch.from_numpy(stream[a + 1 : b + 1].reshape(tokens_BT.shape))
            ids_BT = None
            if document_masking:
                # A token belongs to the document that it is read in, so the prefix is part of the first.
                read_in = np.searchsorted(ends, np.arange(start + a, start + b) - 1, side="right")
                ids_BT = torch.from_numpy(read_in.reshape(tokens_BT.shape)).to(device)
            token_nll = _token_nll(model, tokens_BT.to(device), targets_BT.to(device), ids_BT, autocast)
            nll += np.bincount(owner[a:b], weights=token_nll, minlength=len(chosen))
        if progress:
            progress(stop, total)
    model.train(was_training)
    return Score(nll, corpus.document_bytes()[chosen], sizes)


def _stream(corpus: Corpus, offsets: np.ndarray, chosen: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """A reader of the chosen documents laid end to end."""
    if len(chosen) == len(offsets) - 1:
        return corpus.read
    joined = np.concatenate([corpus.read(int(offsets[i]), int(offsets[i + 1])) for i in chosen])
    return lambda start, stop: joined[start:stop]


def _windows(n: int, sequence: int) -> list[tuple[int, int]]:
    """All full windows as one rectangle, then what is left over as a shorter one."""
    full = n // sequence * sequence
    return [(a, b) for a, b in ((0, full), (full, n)) if a < b]


def _token_nll(
    model: Transformer,
    tokens_BT: torch.Tensor,
    targets_BT: torch.Tensor,
    ids_BT: torch.Tensor | None,
    autocast: torch.dtype | None,
) -> np.ndarray:
    """float64 [B·T]: nats of each target."""
    with torch.autocast(
        tokens_BT.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None
    ):
        x_ND = model.hidden(tokens_BT, document_ids_BT=ids_BT).flatten(0, 1)
        return head_nll(model, x_ND, targets_BT.flatten()).double().cpu().numpy()


def head_nll(model: Transformer, x_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """fp32 [N]: nats of each target, 0 where it is -100; `x_ND` is what the head reads, after the final norm.

    Logits are made for some tokens at a time.
    """
    rows = max(1, _LOGITS_AT_ONCE // model.shape.vocabulary)
    parts = [
        F.cross_entropy(model.head_logits(x_nD).float(), targets_n, reduction="none")
        for x_nD, targets_n in zip(x_ND.split(rows), targets_N.split(rows), strict=True)
    ]
    return torch.cat(parts)


def interval(
    score: Score, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """Bootstrap interval of bits per byte over documents (percentile); None for a single document."""
    n = len(score.document_nll)
    if n < 2:
        return None
    chosen = np.random.default_rng(seed).integers(0, n, (draws, n))
    values = score.document_nll[chosen].sum(1) / (score.document_bytes[chosen].sum(1) * math.log(2))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
