"""The text a model is dissected on: documents laid end to end and cut into windows, as `entasis evaluate` does.

Intervals are over documents, so many documents are wanted rather than long ones: where the text holds more than
is asked for, every document is cut to the same number of tokens, and as many as fit are drawn in a fixed random order.
"""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from entasis.data import left_out
from entasis.data.corpus import Corpus
from entasis.data.readers import Document, Losses
from entasis.data.sources import COLUMN, TextSources, is_corpus
from entasis.data.tokenizer import Tokenizer
from entasis.errors import UserError

MOST_DOCUMENTS = 4096
SHORTEST = 128
"""Tokens below which no document is cut."""
_CHARACTERS_PER_TOKEN = 16
"""More than any tokenizer's average, so that a text cut to so many bytes still fills its share of tokens."""

TextInput = str | Path | Sequence[str]
"""A corpus, a text file, a folder of them, or the documents themselves."""


@dataclass(frozen=True)
class TextBatch:
    """Windows of the text. `owner_N` is the document of each counted target, in the order of `targets_BT`."""

    number: int
    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    owner_N: np.ndarray


@dataclass(frozen=True)
class Text:
    """Documents end to end. `stream` [N + 1] begins with the end-of-text token; target i is `stream[i + 1]`.

    `owner` [N] is the document of each target, -1 where it does not count (the end of a document that was cut).
    """

    stream: np.ndarray
    owner: np.ndarray
    document_bytes: np.ndarray
    names: tuple[str, ...]
    sequence: int

    @property
    def document_tokens(self) -> np.ndarray:
        """int64 [documents]: counted targets."""
        return np.bincount(self.owner[self.owner >= 0], minlength=len(self.names))

    @property
    def tokens(self) -> int:
        return int((self.owner >= 0).sum())

    @property
    def fingerprint(self) -> str:
        """Changes with any token, document boundary or window length."""
        parts = (self.stream.tobytes(), self.owner.tobytes(), str(self.sequence).encode())
        return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()

    def spans(self, rows: int) -> list[tuple[int, int]]:
        """(start, stop) of targets for each batch: of at most `rows` windows, at last of the shorter last window."""
        n = len(self.owner)
        full, step = n // self.sequence * self.sequence, rows * self.sequence
        spans = [(a, min(a + step, full)) for a in range(0, full, step)]
        return spans + ([(full, n)] if full < n else [])

    def batch(self, number: int, span: tuple[int, int], device: torch.device) -> TextBatch:
        """One of `spans` as tensors; targets that do not count are -100."""
        a, b = span
        size = (-1, min(self.sequence, b - a))
        owner = self.owner[a:b]
        targets = np.where(owner >= 0, self.stream[a + 1 : b + 1], -100).reshape(size)
        tokens = self.stream[a:b].reshape(size)
        return TextBatch(
            number,
            torch.from_numpy(tokens).to(device),
            torch.from_numpy(targets).to(device),
            owner[owner >= 0],
        )


def read(
    source: TextInput, tokenizer: Tokenizer | None, *, tokens: int, sequence: int, column: str = COLUMN
) -> Text:
    """At most about `tokens` tokens of `source`; what of it cannot be read is said on stderr.

    Raises `UserError` where there is no text or no tokenizer for it.
    """
    if isinstance(source, str | Path) and is_corpus(source, column):
        corpus = Corpus(source)
        corpus.verify()
        if tokenizer is not None and corpus.tokenizer_hash != tokenizer.hash:
            raise UserError(f"{source}: made with another tokenizer than the model's; give the text itself")
        return _concatenate(*_from_corpus(corpus, tokens), corpus.end_of_text, sequence)
    if tokenizer is None:
        raise UserError(f"{source}: the model has no tokenizer.json; give a corpus made with its tokenizer")
    return _concatenate(*_from_texts(source, tokenizer, tokens, column), tokenizer.end_of_text, sequence)


Excerpts = tuple[list[np.ndarray], list[bool], list[int], list[str]]
"""Ids, whether the document was cut, UTF-8 bytes and name of each document."""


def _from_texts(source: TextInput, tokenizer: Tokenizer, tokens: int, column: str) -> Excerpts:
    losses = Losses()
    if isinstance(source, str | Path):
        found: Iterator[Document] = TextSources((str(source),), column).documents(losses)
    elif column != COLUMN:
        raise UserError(f"--column {column}: a list of documents has no columns")
    else:
        found = (Document(f"document {i}", text) for i, text in enumerate(source) if text)
    most = tokens * _CHARACTERS_PER_TOKEN
    cut_short = (Document(d.name, d.text[:most]) for d in found)
    chosen = heapq.nsmallest(MOST_DOCUMENTS, cut_short, key=lambda d: _rank(d.name))
    left_out.tell(losses.reasons)
    if not chosen:
        raise UserError(f"{source}: no text there")

    def excerpts(cap: int) -> Iterator[tuple[np.ndarray, bool, int, str]]:
        for d in chosen:
            head = d.text[: cap * _CHARACTERS_PER_TOKEN]
            ids = tokenizer.encode(head)
            cut = len(ids) > cap or len(head) < len(d.text)
            size = len((tokenizer.decode(ids[:cap]) if len(ids) > cap else head).encode())
            yield np.array(ids[:cap], np.int64), cut, size, d.name

    return _fill(excerpts, len(chosen), tokens)


def _from_corpus(corpus: Corpus, tokens: int) -> Excerpts:
    offsets, sizes = corpus.document_offsets(), corpus.document_bytes()
    chosen = sorted(range(len(sizes)), key=lambda i: _rank(str(i)))[:MOST_DOCUMENTS]
    ends = int(corpus.end_of_text is not None)

    def excerpts(cap: int) -> Iterator[tuple[np.ndarray, bool, int, str]]:
        for i in chosen:
            start, stop = int(offsets[i]), int(offsets[i + 1]) - ends
            kept = min(cap, stop - start)
            # A cut document's bytes in proportion to its tokens: the corpus knows them only for the whole.
            size = round(int(sizes[i]) * kept / max(1, stop - start))
            yield (
                corpus.read(start, start + kept).astype(np.int64),
                kept < stop - start,
                size,
                f"document {i}",
            )

    return _fill(excerpts, len(chosen), tokens)


def _fill(
    excerpts: Callable[[int], Iterator[tuple[np.ndarray, bool, int, str]]], n: int, tokens: int
) -> Excerpts:
    """Cuts all documents to the same length: a fair share of `tokens`, or the largest that fits where that leaves much over.

    Where they are too many to be cut alike, the first of them are taken.
    """
    share = tokens // n
    taken: list[tuple[np.ndarray, bool, int, str]] = []
    total = 0
    for excerpt in excerpts(max(SHORTEST, share)):
        if taken and total + len(excerpt[0]) > tokens:
            break
        total += len(excerpt[0]) + 1
        taken.append(excerpt)
    # Less than a tenth left over is let be.
    if total <= 0.9 * tokens:
        number = n if share >= SHORTEST else len(taken)
        taken = list(islice(excerpts(_largest_cap(excerpts, number, tokens)), number))
    ids, cuts, sizes, names = map(list, zip(*taken, strict=True))
    return ids, cuts, sizes, names


def _largest_cap(
    excerpts: Callable[[int], Iterator[tuple[np.ndarray, bool, int, str]]], number: int, tokens: int
) -> int:
    """The most tokens, at least `SHORTEST`, to which the first `number` documents can be cut so that they fit into `tokens`."""
    cap = max(SHORTEST, tokens // number)
    while True:
        found = [(len(ids), cut) for ids, cut, _, _ in islice(excerpts(cap), number)]

        def counted(cap: int, found: list[tuple[int, bool]] = found) -> int:
            # The end of a document counts where it was not cut.
            return sum(min(length, cap) + (not cut and length <= cap) for length, cut in found)

        if counted(cap) > tokens or not any(cut for _, cut in found):
            return SHORTEST + bisect_right(range(SHORTEST + 1, cap + 1), tokens, key=counted)
        cap *= 2


def _concatenate(
    ids: list[np.ndarray], cut: list[bool], sizes: list[int], names: list[str], end: int | None, sequence: int
) -> Text:
    # Without an end-of-text token there is nothing to predict the first token from: token 0 stands in.
    stream = [np.array([0 if end is None else end], np.int64)]
    owner = []
    for i, (document, was_cut) in enumerate(zip(ids, cut, strict=True)):
        stream.append(document)
        owner.append(np.full(len(document), i))
        if end is not None:
            stream.append(np.array([end], np.int64))
            owner.append(np.array([-1 if was_cut else i]))
    return Text(np.concatenate(stream), np.concatenate(owner), np.array(sizes), tuple(names), sequence)


def _rank(name: str) -> bytes:
    """A fixed random rank for a document."""
    return hashlib.blake2b(name.encode(), digest_size=8).digest()
