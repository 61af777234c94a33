"""One shard: a safetensors file of tokens that says what they are.

    tokens           uint16 or uint32 [n]         the ids, documents one after another
    documents        int64 [m + 1]                where each document begins; the last entry is n
    document_bytes   int64 [m]                    UTF-8 bytes of each document's text
    document_hashes  uint64 [m], may be missing   hash of each document's text, the same under every tokenizer
    metadata         format, vocabulary, tokenizer (its hash), tokens, bytes, content (a hash), and where there are
                     document_hashes, their own hash: hashes

The dtype stands in the file and is read from it. An id outside the vocabulary is refused when written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from entasis.errors import Damaged, UserError
from entasis.files import aside, write_text

FORMAT = "entasis-tokens-1"
DTYPES: dict[str, np.dtype] = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4")}


def dtype_for(vocabulary: int) -> np.dtype:
    """The narrowest dtype that holds every id below `vocabulary`."""
    return DTYPES["U16"] if vocabulary <= 1 << 16 else DTYPES["U32"]


@dataclass(frozen=True)
class Shard:
    """An opened shard; `tokens` is mapped from disk, not read."""

    path: Path
    tokens: np.ndarray
    documents: np.ndarray
    document_bytes: np.ndarray
    vocabulary: int
    tokenizer_hash: str
    content_hash: str
    document_hashes: np.ndarray | None = None
    hashes_hash: str | None = None
    """Of `document_hashes`; None in shards of earlier versions, which did not write it."""


def write_shard(
    path: Path,
    tokens: np.ndarray,
    documents: np.ndarray,
    document_bytes: np.ndarray,
    *,
    vocabulary: int,
    tokenizer_hash: str,
    document_hashes: np.ndarray | None = None,
) -> str:
    """Writes a shard aside, syncs and renames it; returns its content hash.

    Raises `UserError` when an id is negative or not below `vocabulary`, or when the file exists.
    """
    if path.exists():
        raise UserError(f"{path} exists; nothing is overwritten")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocabulary):
        at = int(np.flatnonzero((tokens < 0) | (tokens >= vocabulary))[0])
        raise UserError(
            f"{path.name}: id {int(tokens[at])} at {at} is outside the vocabulary of {vocabulary}"
        )
    assert documents[0] == 0 and documents[-1] == len(tokens) and len(documents) == len(document_bytes) + 1
    tensors = {
        "tokens": tokens.astype(dtype_for(vocabulary)),
        "documents": documents.astype("<i8"),
        "document_bytes": document_bytes.astype("<i8"),
    }
    content = content_hash(tensors["tokens"], tensors["documents"], tensors["document_bytes"])
    if document_hashes is not None:
        assert len(document_hashes) == len(document_bytes)
        tensors["document_hashes"] = document_hashes.astype("<u8")
    metadata = {
        "format": FORMAT,
        "vocabulary": str(vocabulary),
        "tokenizer": tokenizer_hash,
        "tokens": str(len(tokens)),
        "bytes": str(int(document_bytes.sum())),
        "content": content,
    }
    if document_hashes is not None:
        # Apart from the content hash, which is the corpus's identity and stays what it was in earlier versions.
        metadata["hashes"] = content_hash(tensors["document_hashes"])
    need = sum(array.nbytes for array in tensors.values())
    # One preparation has the folder; the name is fixed so that what it left when killed can be found.
    with aside(path, need=need, locked=True) as partial:
        save_file(tensors, partial, metadata=metadata)
    return content


def hash_of_document(content: bytes) -> int:
    """64 bits: few enough to keep for every document, and enough to tell 10⁸ of them apart."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def content_hash(*arrays: np.ndarray) -> str:
    """A hash over arrays' bytes and dtypes."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(array.dtype.str.encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def open_shard(path: Path) -> Shard:
    """Maps a shard, checking what is cheap: structure, sizes, dtypes, metadata. Raises `UserError`."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            if metadata.get("format") != FORMAT:
                raise UserError(
                    f"{path}: not a token shard of this version (format {metadata.get('format')!r})"
                )
            if names - {"document_hashes"} != {"tokens", "documents", "document_bytes"}:
                raise UserError(
                    f"{path}: holds {sorted(names)}; a shard has tokens, documents, document_bytes"
                )
            documents, document_bytes = file.get_tensor("documents"), file.get_tensor("document_bytes")
            hashes = file.get_tensor("document_hashes") if "document_hashes" in names else None
            kind = file.get_slice("tokens").get_dtype()
    except FileNotFoundError as error:
        raise UserError(f"{path}: the shard is missing; prepare the corpus again") from error
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or cut short ({error}); prepare the corpus again") from error
    if kind not in DTYPES:
        raise UserError(f"{path}: tokens are {kind}; a shard holds U16 or U32")
    try:
        tokens = _map(path, DTYPES[kind])
        vocabulary = int(metadata["vocabulary"])
        whole = (
            len(documents) == len(document_bytes) + 1
            and documents[0] == 0
            and documents[-1] == len(tokens) == int(metadata["tokens"])
            and bool((np.diff(documents) >= 0).all())
            and int(document_bytes.sum()) == int(metadata["bytes"])
            and (hashes is None or len(hashes) == len(document_bytes))
        )
    except (KeyError, ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{path}: its header is damaged ({error}); prepare the corpus again") from error
    if not whole:
        raise UserError(f"{path}: its counts contradict one another; prepare the corpus again")
    return Shard(
        path,
        tokens,
        documents,
        document_bytes,
        vocabulary,
        metadata.get("tokenizer", ""),
        metadata.get("content", ""),
        hashes,
        metadata.get("hashes"),
    )


def is_unchanged(shard: Shard) -> bool:
    """Whether the tensors have the hashes that were written with them; reads the shard whole."""
    if shard.hashes_hash is not None:
        hashes = shard.document_hashes
        if hashes is None or content_hash(hashes) != shard.hashes_hash:
            return False
    content = content_hash(np.asarray(shard.tokens), shard.documents, shard.document_bytes)
    return content == shard.content_hash


def verify(shard: Shard) -> None:
    """Reads a shard whole and compares it with the hashes written in it. Raises `Damaged`.

    A large shard is read once: its size, times and inode are kept with the hash in the user's cache folder, and while
    they are the same it is taken for the same.
    """
    status = shard.path.stat()
    signs = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino} {shard.content_hash}"
    large = status.st_size >= _LARGE
    known = _known(shard.path)
    if large and known.is_file() and known.read_text(encoding="utf-8") == signs:
        return
    if not is_unchanged(shard):
        raise Damaged(
            f"damaged: {shard.path} was changed after it was prepared; restore it, or prepare the corpus again"
        )
    if large and time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _JUST_NOW:
        with contextlib.suppress(OSError):  # a home that cannot be written to
            write_text(known, signs)


_JUST_NOW = 2_000_000_000
"""Nanoseconds within which a file may change again without its times showing it."""
_LARGE = 64 << 20
"""Bytes from which a shard's hash is remembered; a smaller one is read in a tenth of a second."""


def _known(path: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "entasis" / "shards" / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))["tokens"]["data_offsets"]
    if begin == end:
        return np.zeros(0, dtype)
    return np.memmap(
        path, dtype, mode="r", offset=8 + length + begin, shape=((end - begin) // dtype.itemsize,)
    )
