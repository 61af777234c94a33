"""How a file becomes documents: one registered reader for each kind, each streaming."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from entasis.errors import UserError

LONGEST = 1 << 21
"""Characters of one document; a longer text becomes several, cut at ends of lines where there are any."""
LONGEST_LINE = 1 << 28
"""Bytes of one line of jsonl. A file of a few MB can unpack to one line of any length."""
_BLOCK = 1 << 20
_ZSTD_BLOCK = 1 << 10
"""Packed bytes unpacked at once: a few of them can hold 128 KiB, so these hold 32 MiB at most."""
_NAMED = 5
"""So many names are kept of what is left out for one reason."""

NOT_UTF8, REPLACED = "not UTF-8", "undecodable bytes replaced"
UNREADABLE, DAMAGED = "may not be read", "damaged"
NO_ROWS, NO_COLUMN, BAD_ROW, EMPTY = "not lines of JSON", "no text under --column", "bad row", "empty"

EncodingErrors = Literal["drop-file", "replace"]


@dataclass(frozen=True)
class Document:
    """One text and its name: a file's, relative to the source it was found in, and the row in it."""

    name: str
    text: str


@dataclass
class Losses:
    """What is left out or changed, by reason: how many files, rows or documents, their bytes, the first names."""

    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(entry["count"] for entry in self.reasons.values())

    def add(self, reason: str, name: str, size: int) -> None:
        """Counts one more."""
        entry = self.reasons.setdefault(reason, {"count": 0, "bytes": 0, "first": []})
        entry["count"] += 1
        entry["bytes"] += size
        if len(entry["first"]) < _NAMED:
            entry["first"].append(name)


@dataclass(frozen=True)
class SourceFile:
    """A file to be read, and how."""

    path: Path
    name: str
    """Relative to the source it was found in, the same wherever that lies."""
    named: bool
    """Given by name, not found in a folder: a fault in it is refused, not left out."""
    column: str
    encoding_errors: EncodingErrors
    losses: Losses

    def fault(self, reason: str, why: str, *, row: int | None = None, size: int | None = None) -> None:
        """Counts a fault of the file or of one row. Raises `UserError` in a file that was named."""
        at = "" if row is None else f":{row}"
        if self.named:
            raise UserError(f"{self.path}{at}: {why}")
        self.lose(reason, why, at=at, size=size)

    def lose(self, reason: str, why: str = "", *, at: str = "", size: int | None = None) -> None:
        """Counts what is left out or changed."""
        told = f"{self.name}{at}" + f" ({why})" * bool(why)
        self.losses.add(reason, told, self.path.stat().st_size if size is None else size)


Reader = Callable[[SourceFile], Iterator[Document]]
READERS: dict[str, Reader] = {}


def reader(*endings: str) -> Callable[[Reader], Reader]:
    """Registers a reader for file names with these endings."""

    def add(read: Reader) -> Reader:
        READERS.update(dict.fromkeys(endings, read))
        return read

    return add


def ending(path: Path) -> str | None:
    """The registered ending of a file's name, None where it has none."""
    return next((e for e in READERS if path.name.lower().endswith(e)), None)


def read(file: SourceFile) -> Iterator[Document]:
    """The documents of a file, none of them empty, none longer than `LONGEST`; see `SourceFile.fault`."""
    known = ending(file.path)
    found, before = False, file.losses.count
    try:
        for document in (READERS[known] if known else text)(file):
            found = True
            yield from cut(document, file.losses)
    except OSError as error:
        file.lose(UNREADABLE, error.strerror or str(error), size=0)
    if not found and file.losses.count == before:
        file.lose(EMPTY)


def cut(document: Document, losses: Losses) -> Iterator[Document]:
    """The document, or its parts where it is too long; none where it is empty, which is counted."""
    if not document.text:
        losses.add(EMPTY, document.name, 0)
    for number, part in enumerate(_parts([document.text]), 1):
        yield Document(document.name + f"#{number}" * (number > 1), part)


def _parts(blocks: Iterable[str]) -> Iterator[str]:
    """The text of all blocks in parts of at most `LONGEST` characters."""
    left = ""
    for block in blocks:
        left += block
        start = 0
        while len(left) - start > LONGEST:
            stop = left.rfind("\n", start + LONGEST // 2, start + LONGEST) + 1 or start + LONGEST
            yield left[start:stop]
            start = stop
        left = left[start:]
    if left:
        yield left


_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def text(file: SourceFile) -> Iterator[Document]:
    """A text file. All of it is decoded before any of it is given out, a block at a time: a file with bytes that are
    not UTF-8 is dropped whole, or they become U+FFFD."""
    with file.path.open("rb") as opened:
        start = opened.read(4)
    encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")
    decoded, errors = 0, "strict"
    try:
        for block in _blocks(file.path, encoding):
            decoded += len(block)
    except UnicodeDecodeError as error:
        why = f"not {encoding.removesuffix('-sig').upper()} after about {decoded + error.start:,} characters"
        if file.encoding_errors == "drop-file":
            file.lose(NOT_UTF8, why)
            return
        file.lose(REPLACED, why)
        errors = "replace"
    for number, part in enumerate(_parts(_blocks(file.path, encoding, errors)), 1):
        yield Document(file.name + f"#{number}" * (number > 1), part)


def _blocks(path: Path, encoding: str, errors: str = "strict") -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


@reader(*(name + packed for name in (".jsonl", ".ndjson", ".json") for packed in ("", ".gz", ".zst")))
def jsonl(file: SourceFile) -> Iterator[Document]:
    """One JSON object a line, its text under the column. A file whose first line is none is left out whole."""
    first = True
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            found = _row(file, number, line)
        except _NoRow as error:
            whole = first and error.reason in (NO_ROWS, NO_COLUMN)
            reason, why = error.reason, str(error)
            if reason == NO_ROWS and whole:
                why += "; each line must be an object of its own, so write the file as lines of JSON"
            elif reason == NO_ROWS:
                reason = BAD_ROW
            file.fault(reason, why, row=number, size=None if whole else len(line))
            if whole:
                return
        else:
            yield Document(f"{file.name}:{number}", found)
        first = False


class _NoRow(Exception):
    """A line without a text; it says why."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


def _row(file: SourceFile, number: int, line: bytes) -> str:
    """The text of one row, empty where it is null. Raises `_NoRow`."""
    replace, column = file.encoding_errors == "replace", file.column
    encoding, replaced = json.detect_encoding(line), False
    try:
        try:
            row = json.loads(line.decode(encoding))
        except UnicodeDecodeError as error:
            if not replace:
                raise _NoRow(NOT_UTF8, f"not {encoding.upper()} ({error.reason})") from error
            row, replaced = json.loads(line.decode(encoding, "replace")), True
    except RecursionError as error:
        raise _NoRow(BAD_ROW, "nested too deeply") from error
    except ValueError as error:  # too many digits are one too
        raise _NoRow(NO_ROWS, f"not a JSON object with text ({str(error)[:200]})") from error
    if not isinstance(row, dict):
        raise _NoRow(NO_ROWS, f"not a JSON object with text ({type(row).__name__})")
    if column not in row:
        raise _NoRow(NO_COLUMN, f"no key {column!r}; name the right one with --column")
    found = row[column]
    if found is None:
        return ""
    if not isinstance(found, str):
        raise _NoRow(BAD_ROW, f"{column} is no text")
    if _SURROGATE.search(found):
        if not replace:
            raise _NoRow(BAD_ROW, f"{column} holds half a surrogate pair, which no text has")
        found, replaced = _SURROGATE.sub("\ufffd", found), True
    if replaced:
        file.lose(REPLACED, at=f":{number}", size=len(line))
    return found


_SURROGATE = re.compile("[\ud800-\udfff]")


def _lines(file: SourceFile) -> Iterator[bytes]:
    """The lines of a plain or compressed file, up to where it is damaged or one does not end."""
    import zstandard

    number = 0
    try:
        with _opened(file.path) as opened:
            while line := opened.readline(LONGEST_LINE):
                number += 1
                if len(line) >= LONGEST_LINE and not line.endswith(b"\n"):
                    why = f"a line of more than {LONGEST_LINE >> 20} MiB; cut it up"
                    file.fault(DAMAGED, why, row=number)
                    return
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        file.fault(DAMAGED, f"damaged or cut short after line {number} ({error})")


def _opened(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.GzipFile(path))
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_Zstd(path))
    return path.open("rb")


class _Zstd(io.RawIOBase):
    """A zstd file's content, all its frames. Raises `EOFError`, as gzip does, where the last one has no end.

    The library's own reader takes a frame that is cut short for a whole one.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._blocks = self._unpacked()
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # A block of the file may unpack to nothing yet, which is not the end.
        while not self._ready and (block := next(self._blocks, None)) is not None:
            self._ready = memoryview(block)
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n

    def _unpacked(self) -> Iterator[bytes]:
        import zstandard

        frame = None
        while packed := self._file.read(_ZSTD_BLOCK):
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(packed)
                packed = frame.unused_data
                if frame.eof:
                    frame = None
        if frame is not None:
            raise EOFError("the file ends within a zstd frame")

    def close(self) -> None:
        self._file.close()
        super().close()


@reader(".parquet")
def parquet(file: SourceFile) -> Iterator[Document]:
    """A parquet file's column, a batch of rows at a time."""
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file.path)
    except Exception as error:  # pyarrow has its own exceptions for each kind of damage
        file.fault(DAMAGED, f"not a parquet file ({' '.join(str(error).split())[:200]})")
        return
    if file.column not in opened.schema_arrow.names:
        names = ", ".join(opened.schema_arrow.names)
        why = f"no column {file.column!r}, it has {names}; name the right one with --column"
        file.fault(NO_COLUMN, why)
        return
    number, batches = 0, opened.iter_batches(batch_size=512, columns=[file.column])
    while True:
        try:
            values = next(batches).column(0).to_pylist()
        except StopIteration:
            return
        except Exception as error:
            why = f"damaged parquet after row {number} ({' '.join(str(error).split())[:200]})"
            file.fault(DAMAGED, why)
            return
        for value in values:
            number += 1
            if (found := _value(file, number, value)) is not None:
                yield Document(f"{file.name}:{number}", found)


def _value(file: SourceFile, number: int, value: Any) -> str | None:
    """The text of one value of a column, empty where it is null; None where it is no text, which is counted."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, bytes):
        file.fault(BAD_ROW, f"{file.column} is no text ({type(value).__name__})", row=number, size=0)
        return None
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        if file.encoding_errors != "replace":
            file.fault(NOT_UTF8, f"not UTF-8 ({error.reason})", row=number, size=len(value))
            return None
        file.lose(REPLACED, at=f":{number}", size=len(value))
        return value.decode(errors="replace")


def hugging_face(source: str, column: str, losses: Losses) -> Iterator[Document]:
    """`hf:NAME[:CONFIG[:SPLIT]]`, streamed from the hub or from a folder of that name. Raises `UserError`."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"source {source}: needs the extra, pip install 'entasis[hf]'") from error
    name, config, split, *_ = [*source.removeprefix("hf:").split(":"), "", "", ""]
    try:
        rows: Any = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            if column not in row:
                raise UserError(f"source {source}: no column {column!r}, it has {', '.join(row)}")
            value = row[column]
            if value is not None and not isinstance(value, str):
                raise UserError(f"source {source}: column {column!r} holds {type(value).__name__}, no text")
            yield from cut(Document(f"{source}#{number}", value or ""), losses)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"source {source}: cannot be loaded ({' '.join(str(error).split())[:200]})"
        ) from error
