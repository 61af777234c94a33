"""Bits per byte: the one number that compares models with different tokenizers.

    bits per byte = Σ nll / (bytes · ln 2)

The nll (nats) is summed over *every* token, end-of-text tokens included; bytes are those of the documents'
UTF-8 text. The corpus is read as one stream with an end-of-text token before it, cut into windows of
`sequence` tokens that do not overlap, so a token sees between 0 and `sequence − 1` tokens before it, as in
training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from entasis.data.corpus import Corpus
from entasis.data.held_out import Part, choose_documents
from entasis.data.tokenizer import Tokenizer
from entasis.errors import UserError
from entasis.model.transformer import Transformer

_LOGITS_AT_ONCE = 1 << 24
_DRAWN_AT_ONCE = 1 << 20
"""Documents of all resamples that the bootstrap holds together: some 30 MB."""
BLOCKS = 50
"""A lone document is cut into so many blocks, of at most a window and at least `SHORTEST_BLOCK` tokens."""
SHORTEST_BLOCK = 64
FEWEST_BLOCKS = 10
"""Below this the bootstrap's interval is too narrow to be shown."""


@dataclass(frozen=True, slots=True)
class Score:
    """What was measured, document by document; all else follows from the arrays."""

    document_nll: np.ndarray
    """float64 [documents], nats."""
    document_bytes: np.ndarray
    """int64 [documents], UTF-8."""
    document_tokens: np.ndarray
    """int64 [documents], end-of-text included."""
    document_hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """uint64 [documents]: what each is known by; empty for blocks."""
    blocks: Score | None = None
    """A lone document's consecutive blocks, as if they were documents; None where there are too few."""

    ARRAYS: ClassVar = ("document_nll", "document_bytes", "document_tokens", "document_hashes")

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


def join(scores: Sequence[Score]) -> Score:
    """One score of all their documents."""
    arrays: dict[str, Any] = {n: np.concatenate([getattr(s, n) for s in scores]) for n in Score.ARRAYS}
    return Score(**arrays)


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
    max_bytes: int | None = None,
    part: Part = "all",
    document_masking: bool = False,
    rank: int = 0,
    world: int = 1,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Scores whole documents of `corpus`, `batch` windows of `sequence` tokens at a time.

    With the corpus's `tokenizer` a lone document longer than `max_tokens` is cut there, and is scored by blocks too.
    Raises `UserError` where that is within its first character.
    Under several ranks each scores every world-th batch; the sum of their `document_nll` is the whole.
    `progress(done, total)` is called with numbers of tokens.
    """
    offsets = corpus.document_offsets()
    chosen = choose_documents(corpus, max_tokens, max_bytes=max_bytes, part=part)
    sizes = np.diff(offsets)[chosen]
    lone = tokenizer is not None and len(chosen) == 1
    if lone and max_tokens is not None:
        sizes = np.minimum(sizes, max_tokens)
    block = max(SHORTEST_BLOCK, min(sequence, int(sizes[0]) // BLOCKS))
    block_nll = np.zeros(-(-int(sizes[0]) // block) if lone else 0)
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
            if lone:
                number = np.arange(start + a, start + b) // block
                block_nll += np.bincount(number, weights=token_nll, minlength=len(block_nll))
        if progress:
            progress(stop, total)
    model.train(was_training)
    sized = corpus.document_bytes()[chosen]
    hashes = corpus.document_hashes[chosen]
    if tokenizer is None or not lone:
        return Score(nll, sized, sizes, hashes)
    whole = int(offsets[chosen[0] + 1] - offsets[chosen[0]]) == total
    ends_of_blocks = np.minimum(np.arange(1, len(block_nll) + 1) * block, total)
    ids = read(0, total)
    if whole and ids[-1] == corpus.end_of_text:
        ids = ids[:-1]  # closes the document, and is no text of it
    texts = _bytes_before(ids, np.minimum(ends_of_blocks, len(ids)), tokenizer)
    if not whole:
        sized = texts[-1:]
        if not sized[0]:
            raise UserError(f"{total} tokens end within the text's first character; score more of them")
    if len(block_nll) < FEWEST_BLOCKS:
        return Score(nll, sized, sizes, hashes)
    # A whole document's bytes are those of its text, of which a tokenizer may give back more or less.
    block_bytes = np.diff(np.round(texts * (sized[0] / texts[-1])).astype(np.int64), prepend=0)
    return Score(nll, sized, sizes, hashes, Score(block_nll, block_bytes, np.diff(ends_of_blocks, prepend=0)))


def _bytes_before(ids: np.ndarray, ends: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """int64 [ends]: UTF-8 bytes of the text of the first ids up to each of `ends`, which ascend.

    A character that an end cuts through is left to what comes after it. Every block is decoded behind the one before
    it, so that a space between the two is not taken for the beginning of a text, and the work stays linear.
    """
    sizes, size, context, start = [], 0, 0, 0
    for end in ends.tolist():
        text, stop = tokenizer.decode(ids[context:end]), end
        if text.endswith("\ufffd"):
            # A character has up to four bytes, and so many tokens: without those of a cut one fewest are broken.
            stops = range(end, max(start, end - 3) - 1, -1)
            texts = [(tokenizer.decode(ids[context:shorter]), shorter) for shorter in stops]
            text, stop = min(texts, key=lambda pair: pair[0].count("\ufffd"))
        size += len(text.encode()) - len(tokenizer.decode(ids[context:start]).encode())
        sizes.append(size)
        context, start = start, stop
    return np.array(sizes)


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
    from scipy import stats  # a second to import, so only where an interval is wanted

    def statistic(nll: np.ndarray, size: np.ndarray, axis: int) -> np.ndarray:
        return nll.sum(axis) / (size.sum(axis) * math.log(2))

    found = stats.bootstrap(
        (score.document_nll, score.document_bytes),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=draws,
        batch=max(1, _DRAWN_AT_ONCE // n),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
