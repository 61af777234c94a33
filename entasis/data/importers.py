"""Token files of other projects, brought in with their dtype told and the doctor's consent.

Each format is one registered function `(path, dtype) -> TokenFile`; one whose files say their own dtype refuses to be
told another.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from entasis.data import doctor
from entasis.data import tokenizer as tokenizers
from entasis.data.corpus import INDEX, TOKENIZER
from entasis.data.prepare import SHARD_TOKENS, Progress, totals
from entasis.data.shards import write_shard
from entasis.errors import UserError
from entasis.files import write_json


@dataclass(frozen=True)
class TokenFile:
    """Ids, and where documents begin (ascending) in a format that says it."""

    ids: np.ndarray
    begins: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


Importer = Callable[[Path, str | None], TokenFile]
IMPORTERS: dict[str, Importer] = {}


def importer(name: str) -> Callable[[Importer], Importer]:
    """Registers a format under `name`."""

    def add(read: Importer) -> Importer:
        IMPORTERS[name] = read
        return read

    return add


def import_tokens(
    source: str | Path,
    output: str | Path,
    *,
    format: str,
    dtype: str | None,
    tokenizer: str | Path,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes `output` as a corpus from a token file; returns what it holds.

    The ids are split into documents at the tokenizer's end-of-text token and where the file itself says that one begins,
    and each document's bytes are counted by decoding it. `note` says where no end-of-text token is among them.
    Raises `UserError` when the doctor finds the ids corrupt, or `output` is not empty.
    """
    source, output = Path(source), Path(output)
    if format not in IMPORTERS:
        raise UserError(f"--format {format!r} is not known; choose one of {', '.join(IMPORTERS)}")
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output}: not empty; name another folder")
    chosen = tokenizers.load(tokenizer)
    file = IMPORTERS[format](source, dtype)
    ids, end = file.ids, chosen.end_of_text
    if not len(ids):
        raise UserError(f"{source}: no tokens in it")
    diagnosis = doctor.examine_ids(source, ids, [], chosen.vocabulary, chosen)
    if not diagnosis.sound:
        first = diagnosis.findings[0]
        raise UserError(f"{source}: {first.name}: {first.evidence}; {first.fix}")
    output.mkdir(parents=True, exist_ok=True)
    shards: dict[str, str] = {}
    closed, start = False, 0
    while start < len(ids):
        offsets = _documents(file, start, min(len(ids), start + shard_tokens), end)
        if start + offsets[-1] < len(ids) and len(offsets) > 2:
            offsets = offsets[:-1]  # a document that goes on begins the next shard
        stop = start + int(offsets[-1])
        name = f"shard-{len(shards):05d}.safetensors"
        part = np.asarray(ids[start:stop])
        closed = closed or bool((part == end).any())
        sizes = [_bytes(chosen, part[a:b]) for a, b in itertools.pairwise(offsets)]
        shards[name] = write_shard(
            output / name,
            part,
            offsets,
            np.array(sizes, np.int64),
            vocabulary=chosen.vocabulary,
            tokenizer_hash=chosen.hash,
        )
        if progress:
            progress("tokens", stop * ids.dtype.itemsize, len(ids) * ids.dtype.itemsize)
        start = stop
    chosen.save(output / TOKENIZER)
    index = {
        "shards": shards,
        "vocabulary": chosen.vocabulary,
        "tokenizer": chosen.hash,
        "end_of_text": chosen.end_of_text,
    }
    write_json(output / INDEX, index)
    result = {"output": str(output), "format": format, **totals(output)}
    if closed:
        return result
    told = "documents end where the file says" if len(file.begins) else "all of it is one document"
    return {**result, "note": f"{source}: has no end-of-text token of this tokenizer; {told}"}


def _documents(file: TokenFile, start: int, stop: int, end: int | None) -> np.ndarray:
    """Where documents begin among the ids from `start` to `stop`, counted from `start`, and how many ids these are."""
    ids = file.ids[start:stop]
    closed: np.ndarray = np.flatnonzero(ids == end) + 1 if end is not None else np.zeros(0, np.int64)
    told = file.begins[np.searchsorted(file.begins, start) : np.searchsorted(file.begins, stop)] - start
    return np.unique(np.concatenate([[0], closed, told, [len(ids)]])).astype(np.int64)


def _bytes(chosen: tokenizers.Tokenizer, ids: np.ndarray) -> int:
    text = ids[:-1] if len(ids) and ids[-1] == chosen.end_of_text else ids
    return len(chosen.decode(text).encode("utf-8"))


@importer("raw")
def raw(path: Path, dtype: str | None) -> TokenFile:
    """Nothing but ids, in the dtype that is told."""
    if dtype is None:
        raise UserError(f"{path}: the file does not say its type; tell its --dtype (it is never guessed)")
    kind = doctor.parse_dtype(dtype)
    size = path.stat().st_size
    if size % kind.itemsize:
        raise UserError(
            f"{path}: {size} bytes are no whole number of {kind.itemsize}-byte ids; it is cut short or not {dtype}"
        )
    return TokenFile(np.memmap(path, kind, mode="r") if size else np.zeros(0, kind))


@importer("nanogpt")
def nanogpt(path: Path, dtype: str | None) -> TokenFile:
    """nanoGPT's train.bin: ids and nothing else, uint16 as its scripts write them; the dtype must be told."""
    return raw(path, dtype)


@importer("llm.c")
def llm_c(path: Path, dtype: str | None) -> TokenFile:
    """llm.c's .bin: 256 int32 of header (magic, version, number of tokens), then uint16 or uint32 by its magic."""
    kinds = {20240520: "uint16", 20240801: "uint32"}
    with path.open("rb") as file:
        header = np.frombuffer(file.read(1024).ljust(1024, b"\0"), "<i4")
    if int(header[0]) not in kinds:
        raise UserError(
            f"{path}: not an llm.c file; its first number is not one of {', '.join(map(str, kinds))}"
        )
    kind = _own_dtype(path, dtype, kinds[int(header[0])])
    wanted, held = int(header[2]), (path.stat().st_size - 1024) // kind.itemsize
    if held != wanted:
        raise UserError(f"{path}: its header promises {wanted} tokens, it holds {held}; it is cut short")
    return TokenFile(np.memmap(path, kind, mode="r", offset=1024, shape=(wanted,)))


@importer("npy")
def npy(path: Path, dtype: str | None) -> TokenFile:
    """NumPy's own format; never a pickle."""
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except doctor.NO_NPY as error:
        raise UserError(f"{path}: not a readable .npy file ({error})") from error
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "ui":
        raise UserError(f"{path}: holds {getattr(ids, 'dtype', 'no array')}, which are no token ids")
    _own_dtype(path, dtype, str(ids.dtype.newbyteorder("=")))
    return TokenFile(ids.reshape(-1))


@importer("megatron")
def megatron(path: Path, dtype: str | None) -> TokenFile:
    """Megatron's .bin with its .idx beside it, which says the dtype, the length of each sequence and the documents."""
    index = path.with_suffix(".idx")
    if not index.is_file():
        raise UserError(f"{path}: its index {index.name} is missing")
    data = index.read_bytes()
    if data[:9] != b"MMIDIDX\x00\x00" or len(data) < 34:
        raise UserError(f"{index}: not a Megatron index")
    version, code, sequences, documents = struct.unpack("<QBQQ", data[9:34])
    kinds = {1: "uint8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
    if version != 1 or code not in kinds:
        raise UserError(f"{index}: version {version} and dtype code {code}; version 1 with ids is known")
    if len(data) < 34 + 12 * sequences + 8 * documents:
        raise UserError(f"{index}: cut short")
    kind = _own_dtype(path, dtype, kinds[code])
    ends = np.concatenate([[0], np.cumsum(np.frombuffer(data, "<i4", sequences, 34), dtype=np.int64)])
    wanted = int(ends[-1])
    held = path.stat().st_size // kind.itemsize
    if held != wanted:
        raise UserError(f"{path}: its index promises {wanted} tokens, it holds {held} of {kind}")
    # The numbers of the sequences that documents begin with, and how many there are; between them lie the pointers.
    first = np.frombuffer(data, "<i8", documents, 34 + 12 * sequences)
    if len(first) and not (first.min() >= 0 and first.max() <= sequences):
        raise UserError(f"{index}: names a sequence that it does not have")
    ids = np.memmap(path, kind, mode="r", shape=(wanted,)) if wanted else np.zeros(0, kind)
    return TokenFile(ids, np.unique(ends[first]))


def _own_dtype(path: Path, told: str | None, own: str) -> np.dtype:
    if told is not None and told != own:
        raise UserError(f"{path}: says itself that it holds {own}, not {told}; leave --dtype out")
    return doctor.parse_dtype(own)
