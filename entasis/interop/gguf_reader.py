"""Reading GGUF files that may be damaged or hostile.

`gguf.GGUFReader` believes every count in the file (a claimed 2^60 keys is a loop of 2^60 steps) and keeps
an array object for each string of the vocabulary, so the header is read here: each count is held against
the bytes that are left before anything is allocated. Dequantising is left to `gguf.quants`.

Layout (little-endian): magic, version, number of tensors, number of keys; the keys; for each tensor its
name, sizes (innermost first), type and offset; padding; the data.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from entasis.errors import UserError
from entasis.interop.config_reader import shorten

MOST_ENTRIES = 16_384
"""Keys, and tensors, that a file may have. Real ones have some hundreds; bounds what a hostile header
costs."""
_LIST_UP_TO = 4_096
"""Arrays of numbers up to this long become lists (a value for each layer); longer ones stay arrays."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_WEIGHTS = {
    kind
    for kind in GGMLQuantizationType
    if kind.name not in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")
}
_NO_WEIGHTS = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")
_NATIVE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Strings:
    """Where an array of strings lies; `GGUFFile.strings` decodes it."""

    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies, and as what."""

    size: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    n_bytes: int
    path: Path


class GGUFFile:
    """An open GGUF file whose header has been checked against its length, with all parts where it is split.

    A split file is opened by its first part, NAME-00001-of-00003.gguf. `metadata` holds key → number, string, list or array of numbers, or `Strings`; `tensors` name →
    `Stored`, with sizes outermost first, as in PyTorch. Raises `UserError` for anything that is not a
    whole, sound GGUF file.
    """

    def __init__(self, path: Path, *, part: int = 0) -> None:
        self.path, self.files = path, [path]
        with path.open("rb") as file:
            length = path.stat().st_size
            if length < 24:
                raise UserError(f"{path.name}: {length} bytes are too few for a GGUF file")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._length, self._at = length, 0
        try:
            self._read_header()
            self._join(part)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets the file go."""
        self._bytes.close()

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Name → size of every tensor."""
        return {name: stored.size for name, stored in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype a tensor is stored in, None where it is quantised."""
        return _NATIVE.get(self.tensors[name].kind.name)

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its own dtype; a quantised one as float32."""
        stored = self.tensors[name]
        raw = bytearray(stored.n_bytes)
        # Read, not mapped: a mapping of the whole file would come to be held in memory.
        with stored.path.open("rb") as file:
            file.seek(stored.start)
            if file.readinto(raw) != stored.n_bytes:
                raise UserError(f"{stored.path.name}: was cut short while it was read")
        if (dtype := self.dtype(name)) is not None:
            return torch.frombuffer(raw, dtype=dtype).reshape(stored.size)
        rows = np.frombuffer(raw, np.uint8).reshape(*stored.size[:-1], -1)
        return torch.from_numpy(np.ascontiguousarray(dequantize(rows, stored.kind))).reshape(stored.size)

    def strings(self, key: str) -> list[str]:
        """The strings of an array of strings."""
        where = self.metadata.get(key)
        if not isinstance(where, Strings):
            raise UserError(f"{self.path.name}: {key} is missing or not an array of strings")
        self._at = where.start
        return [self._string(key) for _ in range(where.count)]

    def _read_header(self) -> None:
        if self._bytes[:4] != b"GGUF":
            raise UserError(f"{self.path.name}: is not a GGUF file (it begins with {self._bytes[:4]!r})")
        self._at = 4
        version = self._number("I", "version")
        if version not in (2, 3):
            raise UserError(f"{self.path.name}: GGUF version {version} is not 2 or 3 (little-endian)")
        n_tensors, n_keys = self._count("tensors", 24, 8), self._count("keys", 13, 0)
        self.metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._string("a key")
            if not key.isprintable() or not key:
                raise UserError(f"{self.path.name}: key {_quoted(key)} has no printable name")
            if key in self.metadata:
                raise UserError(f"{self.path.name}: key {_quoted(key)} is there twice")
            self.metadata[key] = self._value(self._number("I", "a type"), _quoted(key))
        self._read_tensors(n_tensors)

    def _read_tensors(self, count: int) -> None:
        described: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(count):
            name = self._string("a tensor's name")
            n_sizes = self._number("I", name)
            if not 1 <= n_sizes <= 4:
                raise UserError(
                    f"{self.path.name}: tensor {_quoted(name)} has {n_sizes} dimensions, not 1 to 4"
                )
            size = tuple(self._number("Q", name) for _ in range(n_sizes))[::-1]
            described.append((name, size, self._number("I", name), self._number("Q", name)))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in (8 << k for k in range(14)):
            raise UserError(f"{self.path.name}: general.alignment is not a power of two from 8 to 65536")
        data = -(-self._at // alignment) * alignment
        self.tensors: Mapping[str, Stored] = {}
        for name, size, kind, offset in described:
            if not name.isprintable() or not name:
                raise UserError(f"{self.path.name}: tensor {_quoted(name)} has no printable name")
            if name in self.tensors:
                raise UserError(f"{self.path.name}: tensor {_quoted(name)} is there twice")
            self.tensors[name] = self._stored(_quoted(name), size, kind, data, offset, alignment)
        end, last = 0, ""
        for name, stored in sorted(self.tensors.items(), key=lambda item: item[1].start):
            if stored.start < end:
                raise UserError(f"{self.path.name}: tensors {_quoted(last)} and {_quoted(name)} overlap")
            end, last = stored.start + stored.n_bytes, name

    def _stored(
        self, name: str, size: tuple[int, ...], kind: int, data: int, offset: int, alignment: int
    ) -> Stored:
        try:
            quantisation = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[quantisation]
        except (ValueError, KeyError):
            raise UserError(f"{self.path.name}: tensor {name} is of the unknown type {kind}") from None
        if quantisation.name in _NO_WEIGHTS:
            raise UserError(f"{self.path.name}: tensor {name} is {quantisation.name}; weights are not")
        if min(size) < 1 or size[-1] % block:
            raise UserError(f"{self.path.name}: tensor {name} is {size}, not rows of whole blocks of {block}")
        n_bytes = math.prod(size) // block * block_bytes
        if offset % alignment or data + offset + n_bytes > self._length:
            raise UserError(
                f"{self.path.name}: tensor {name}, {n_bytes} bytes at {offset}, does not lie within the "
                f"{max(self._length - data, 0)} bytes of data; the file is cut short or damaged"
            )
        return Stored(size, quantisation, data + offset, n_bytes, self.path)

    def _join(self, part: int) -> None:
        """Takes in the tensors of the other parts of a split file; `part` is which one this has to be."""
        count, number = self.metadata.get("split.count", 0), self.metadata.get("split.no", 0)
        if count in (0, 1) and not part:
            return
        named = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", self.path.name)
        if not named or int(named[3]) != count or int(named[2]) != number + 1 or number != part:
            raise UserError(
                f"{self.path.name}: says it is part {number} (from 0) of {count}; name the first part, "
                "NAME-00001-of-NNNNN.gguf, with the others beside it"
            )
        if part:
            return
        paths = [self.path.with_name(f"{named[1]}-{i + 1:05d}-of-{named[3]}.gguf") for i in range(1, count)]
        for path in paths:
            if not path.is_file():
                raise UserError(f"{path.name}: is missing; {self.path.name} is one of {count} parts")
        tensors = dict(self.tensors)
        for i, path in enumerate(paths, 1):
            other = GGUFFile(path, part=i)
            other.close()
            if twice := tensors.keys() & other.tensors.keys():
                raise UserError(f"{path.name}: tensor {_quoted(min(twice))} is in another part too")
            tensors.update(other.tensors)
        if self.metadata.get("split.tensors.count", len(tensors)) != len(tensors):
            raise UserError(
                f"{self.path.name}: its parts hold {len(tensors)} tensors, not as many as it says"
            )
        self.tensors, self.files = tensors, [self.path, *paths]

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            number = self._number(_SCALARS[kind], key)
            # The shortest decimal of the same float32: 1e-5, not 9.999999747378752e-06.
            return float(str(np.float32(number))) if _SCALARS[kind] == "f" else number
        if kind == _STRING:
            return self._string(key)
        if kind != _ARRAY:
            raise UserError(f"{self.path.name}: {key} is of the unknown type {kind}")
        item = self._number("I", key)
        if item == _STRING:
            count = self._count(key, 8, 0, most=None)
            start = self._at
            for _ in range(count):
                self._skip(self._number("Q", key), key)
            return Strings(start, count)
        if item not in _SCALARS:
            raise UserError(f"{self.path.name}: {key} is an array of the unsupported type {item}")
        count = self._count(key, struct.calcsize(_SCALARS[item]), 0, most=None)
        dtype = np.dtype(_SCALARS[item]).newbyteorder("<")
        array = np.frombuffer(self._bytes, dtype, count, self._at).copy()
        self._at += array.nbytes
        return array.tolist() if count <= _LIST_UP_TO else array

    def _count(self, what: str, least: int, more: int, most: int | None = MOST_ENTRIES) -> int:
        """A count of things of which each takes at least `least` bytes, `more` bytes being needed besides."""
        count: int = self._number("Q", what)
        room = (self._length - self._at - more) // least
        if count > room or (most is not None and count > most):
            raise UserError(f"{self.path.name}: claims {count} {what}, for which the file has no room")
        return count

    def _number(self, code: str, what: str) -> Any:
        start = self._at
        self._skip(struct.calcsize(code), what)
        return struct.unpack_from("<" + code, self._bytes, start)[0]

    def _string(self, what: str) -> str:
        length = self._number("Q", what)
        start = self._at
        self._skip(length, what)
        try:
            return self._bytes[start : self._at].decode()
        except UnicodeDecodeError:
            raise UserError(f"{self.path.name}: {_quoted(what)} holds text that is not UTF-8") from None

    def _skip(self, n_bytes: int, what: str) -> None:
        if n_bytes > self._length - self._at:
            raise UserError(
                f"{self.path.name}: ends in the middle of {_quoted(what)}; it is cut short or damaged"
            )
        self._at += n_bytes


def _quoted(name: str) -> str:
    return repr(shorten(name))
