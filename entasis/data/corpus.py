"""A corpus: a folder of shards with their tokenizer."""

from __future__ import annotations

import hashlib
import itertools
from functools import cached_property
from pathlib import Path

import numpy as np

from entasis.data.shards import Shard, hash_of_document, open_shard, verify
from entasis.errors import UserError
from entasis.files import read_json

INDEX, TOKENIZER = "corpus.json", "tokenizer.json"


class Corpus:
    """An opened corpus. Tokens stay on disk until they are read.

    Raises `UserError` when the folder is none, or a shard is missing, cut short or not one of its own.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            index = read_json(self.path / INDEX)
            names = list(index["shards"])
            self.end_of_text: int | None = index["end_of_text"]
            self.vocabulary: int = index["vocabulary"]
            self.tokenizer_hash: str = index["tokenizer"]
            self.corruption: str | None = index.get("corruption", index.get("danger"))
            """What was done to its ids on purpose, see `entasis.data.corruption`; `danger` until version 0.1."""
            self.text_lost: float | None = index.get("text_lost")
            """Share of the text's bytes that the ids do not give back; None where nobody measured it."""
        except FileNotFoundError as error:
            parts = [p.parent.name for p in sorted(self.path.glob(f"*/{INDEX}"))]
            advice = (
                f"name one of its parts: {', '.join(parts)}"
                if parts
                else "make one with `entasis data prepare`"
            )
            raise UserError(f"{self.path}: no corpus here; {advice}") from error
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.path / INDEX}: not a corpus index ({error})") from error
        if not names or not isinstance(index["shards"], dict):
            raise UserError(f"{self.path / INDEX}: names no shards; prepare the corpus again")
        self.shards: list[Shard] = [open_shard(self.path / name) for name in names]
        for shard, content in zip(self.shards, index["shards"].values(), strict=True):
            if (shard.content_hash, shard.vocabulary, shard.tokenizer_hash) != (
                content,
                self.vocabulary,
                self.tokenizer_hash,
            ):
                raise UserError(f"{shard.path}: not the shard that {INDEX} names; prepare the corpus again")
        self._ends = np.cumsum([len(s.tokens) for s in self.shards], dtype=np.int64)
        self.tokens = int(self._ends[-1]) if self.shards else 0
        self.documents = sum(len(s.document_bytes) for s in self.shards)
        self.bytes = int(sum(int(s.document_bytes.sum()) for s in self.shards))

    def verify(self) -> None:
        """Reads all shards and compares tokens, documents' lengths and bytes with their hashes. Raises `Damaged`."""
        for shard in self.shards:
            verify(shard)

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the content of all shards, in order."""
        return hashlib.blake2b(
            "".join(s.content_hash for s in self.shards).encode(), digest_size=16
        ).hexdigest()

    @property
    def dtype(self) -> np.dtype:
        return self.shards[0].tokens.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop - 1 of the whole corpus, in the shards' dtype."""
        assert 0 <= start <= stop <= self.tokens, (start, stop, self.tokens)
        parts, i = [], int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = int(self._ends[i]) - len(self.shards[i].tokens)
            end = min(stop, int(self._ends[i]))
            parts.append(self.shards[i].tokens[start - begin : end - begin])
            start, i = end, i + 1
        return np.concatenate(parts) if len(parts) != 1 else np.asarray(parts[0])

    def document_offsets(self) -> np.ndarray:
        """Where each document begins in the whole corpus, and the total: int64 [documents + 1]."""
        begins = self._ends - [len(s.tokens) for s in self.shards]
        parts = [s.documents[:-1] + begin for s, begin in zip(self.shards, begins, strict=True)]
        return np.concatenate([*parts, np.array([self.tokens], np.int64)])

    @cached_property
    def document_hashes(self) -> np.ndarray:
        """What each document is known by: uint64 [documents], of its text, or of its ids where no text was at hand."""
        return np.concatenate([_hashes(shard) for shard in self.shards])

    def document_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document's text: int64 [documents]."""
        return np.concatenate([s.document_bytes for s in self.shards])


def _hashes(shard: Shard) -> np.ndarray:
    if shard.document_hashes is not None:
        return shard.document_hashes
    edges = itertools.pairwise(shard.documents.tolist())
    return np.array([hash_of_document(shard.tokens[a:b].tobytes()) for a, b in edges], np.uint64)
