"""Tokenizers: all of them `tokenizers.Tokenizer` underneath, plain bytes included."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, decoders, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE

from entasis.errors import UserError
from entasis.files import write_text

END_OF_TEXT = "<|endoftext|>"
_UNKNOWN = ("<unk>", "[UNK]", "<UNK>", "[unk]")
_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")

_MOST_IDS = 1 << 24


class Tokenizer:
    """Text to ids and back. `hash` identifies it; `end_of_text` closes a document (None when there is none)."""

    def __init__(self, library: Library) -> None:
        self.library = library
        library.no_padding()
        library.no_truncation()
        ids = library.get_vocab(with_added_tokens=True)
        self.vocabulary = max(ids.values(), default=-1) + 1
        if not 0 < self.vocabulary <= _MOST_IDS:
            # The library walks from id 0 to the highest when it writes itself.
            raise UserError(
                f"its ids go up to {self.vocabulary - 1}; a tokenizer has from 1 to {_MOST_IDS:,} ids"
            )
        self.end_of_text: int | None = next((ids[name] for name in _ENDS if name in ids), None)
        self.unknown: int | None = next((ids[name] for name in _UNKNOWN if name in ids), None)
        """Stands for text that the tokenizer has no ids for."""
        self.hash = hashlib.blake2b(library.to_str().encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        with _named():
            return self.library.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def prefix(self) -> list[int]:
        """What its own settings put in front of a text, such as `<s>`; corpora are made without."""
        try:
            with _named():
                plain, whole = (self.library.encode("a", add_special_tokens=own).ids for own in (False, True))
        except UserError:
            return []  # it has no letters
        starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return whole[: next(starts, 0)]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, on all cores. Raises `UserError` where the tokenizer itself gives up."""
        with _named():
            encoded = self.library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.uint32) for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        plain = ids.tolist() if isinstance(ids, np.ndarray) else [int(i) for i in ids]
        return self.library.decode(plain, skip_special_tokens=False)

    def continuation(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        """The text that `answer` adds to that of `prompt`.

        Decoded alone it would lose the space before it: SentencePiece's tokenizers take a text's first one away.
        """
        return self.decode([*prompt, *answer])[len(self.decode(prompt)) :]

    def save(self, path: str | Path) -> None:
        """Writes `tokenizer.json`."""
        write_text(Path(path), self.library.to_str())


@contextmanager
def _named() -> Iterator[None]:
    """The library raises bare Exception, and Rust panics, which are none, where a split pattern backtracks too far."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        words = " ".join(str(error).split())[:200]
        raise UserError(
            f"the tokenizer cannot split this text ({words}); look at its split pattern"
        ) from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """The library raises bare Exception, and Rust panics, which are none, for some damaged files."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise UserError(f"tokenizer {path}: cannot be read ({' '.join(str(error).split())})") from error


def load(source: str | Path) -> Tokenizer:
    """A tokenizer from `bytes`, a `tokenizer.json`, a folder with one, or a folder with GPT-2's vocabulary and merges.

    Raises `UserError` when there is none or it cannot be read.
    """
    if source == "bytes":
        return from_bytes()
    path = Path(source)
    if path.is_dir():
        for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
            if (path / vocabulary).is_file() and not (path / "tokenizer.json").is_file():
                return from_gpt2(path / vocabulary, path / merges)
        path = path / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"tokenizer {source}: no such file; give a tokenizer.json, a GPT-2 folder, or bytes")
    with _readable(path):
        return Tokenizer(Library.from_str(path.read_text(encoding="utf-8")))


def from_bytes() -> Tokenizer:
    """Every byte of the UTF-8 text is a token (ids 0 … 255), and 256 ends a document."""
    # `tokenizers` writes bytes as printable characters; sorted by byte value they are the ids.
    return _byte_level(dict(byte_symbols()), [])


def from_gpt2(vocabulary: Path, merges: Path) -> Tokenizer:
    """GPT-2's own files: a JSON of symbols to ids and a list of merges."""
    with _readable(vocabulary.parent):
        ids = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").splitlines()
        found = (line.split(" ", 1) for line in lines if line and not line.startswith("#version"))
        pairs = [(a, b) for a, b in found]
        return _byte_level(ids, pairs)


def train(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE with `vocabulary` ids, its end-of-text included, trained on `texts`.

    The same texts give the same tokenizer. Raises `UserError` below 257 ids.
    """
    if vocabulary < 257:
        raise UserError(f"--train-tokenizer {vocabulary}: a byte-level tokenizer has at least 257 ids")
    library = _empty()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return Tokenizer(library)


def _empty(model: BPE | None = None) -> Library:
    library = Library(model or BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def _byte_level(ids: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    library = _empty(BPE(vocab=ids, merges=merges))
    library.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return Tokenizer(library)


@functools.cache
def byte_symbols() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where it is printable, else from U+0100 upwards."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols, spare = {}, 256
    for byte in range(256):
        symbols[chr(byte if byte in plain else spare)] = byte
        spare += byte not in plain
    return symbols
