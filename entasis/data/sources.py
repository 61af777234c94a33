"""Where documents come from: one registered reader for each kind of source, each streaming."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from entasis.errors import UserError

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".h", ".html", ".tex", ".text", ""}
LONGEST = 1 << 21
"""Characters of one document; a longer text becomes several, cut at ends of lines where there are any."""
_BLOCK = 1 << 20
LONGEST_LINE = 1 << 28
"""Bytes of one line of jsonl. A file of a few MB can unpack to one line of any length."""
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One text and its name: a file's, relative to the source it was found in, and the row in it."""

    name: str
    text: str


Reader = Callable[[Path, str], Iterator[Document]]
READERS: dict[str, Reader] = {}


def reader(*endings: str) -> Callable[[Reader], Reader]:
    """Registers a reader `(path, column) -> documents` for file names with these endings."""

    def add(read: Reader) -> Reader:
        READERS.update(dict.fromkeys(endings, read))
        return read

    return add


class NoText(Exception):
    """A file of a folder that cannot be read as text; it says why."""


Skip = Callable[[Path, str], Any]
"""Called with each file that is left out, and why."""


def documents(
    sources: Sequence[str | Path], column: str = "text", skip: Skip = lambda path, why: None
) -> Iterator[Document]:
    """All documents of all sources, in a fixed order. Empty ones are left out. Raises `UserError`."""
    for source in sources:
        if str(source).startswith("hf:"):
            found = _hugging_face(str(source), column)
        else:
            found = _of_files(source, column, skip)
        for document in found:
            yield from _cut(document)


def _cut(document: Document) -> Iterator[Document]:
    """The document, or its parts where it is too long; none where it is empty."""
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


def _of_files(source: str | Path, column: str, skip: Skip) -> Iterator[Document]:
    """Documents of a file, a folder or `stdlib`, named from there: the same on any machine, wherever it lies."""
    root = Path(sysconfig.get_paths()["stdlib"]) if str(source) == "stdlib" else Path(source)
    for path in files([source]):
        name = str(path.relative_to(root)) if path != root else path.name
        try:
            for document in _reader_of(path)(path, column):
                yield Document(name + document.name.removeprefix(str(path)), document.text)
        except (NoText, PermissionError) as error:
            skip(path, str(error) if isinstance(error, NoText) else "it may not be read")


def files(sources: Sequence[str | Path]) -> list[Path]:
    """The files of sources that are files, folders (searched, in order of name) or `stdlib`."""
    result: list[Path] = []
    for source in sources:
        path = Path(source)
        if str(source) == "stdlib":
            result += _stdlib()
        elif path.is_dir():
            inside = (p for p in _walk(path) if not p.name.startswith("."))
            result += [p for p in inside if _ending(p) or p.suffix.lower() in TEXT_SUFFIXES]
        elif path.is_file():
            result.append(path)
        else:
            raise UserError(f"source {source}: no such file or folder (stdlib and hf:NAME are known too)")
    return result


def _walk(root: Path) -> list[Path]:
    """The files below a folder, in order of name. Links are followed, each real folder and file taken once."""
    seen: set[str] = set()
    found: list[Path] = []
    waiting = [str(root)]
    links: list[Path] = []
    while waiting:
        for folder, inside, names in os.walk(waiting.pop(0)):
            if (real := os.path.realpath(folder)) in seen:
                inside.clear()
                continue
            seen.add(real)
            waiting += sorted(str(Path(folder, n)) for n in inside if Path(folder, n).is_symlink())
            for path in (Path(folder, n) for n in names):
                if path.is_symlink():
                    links.append(path)
                elif path.is_file():
                    found.append(path)
    real_files = {os.path.realpath(p) for p in found} if links else set()
    for path in sorted(links):
        if path.is_file() and (real := os.path.realpath(path)) not in real_files:
            real_files.add(real)
            found.append(path)
    return sorted(found)


def _stdlib() -> list[Path]:
    """The Python source of the running interpreter's own standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = (p for p in sorted(root.rglob("*.py")) if not _NOT_STDLIB & set(p.relative_to(root).parts))
    result = list(found)
    if not result:
        raise UserError(f"source stdlib: this interpreter has no source files under {root}")
    return result


def _ending(path: Path) -> str | None:
    return next((e for e in READERS if path.name.lower().endswith(e)), None)


def _reader_of(path: Path) -> Reader:
    ending = _ending(path)
    return READERS[ending] if ending else _text


_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _text(path: Path, column: str) -> Iterator[Document]:
    with path.open("rb") as file:
        start = file.read(4)
    encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")
    # Bytes that are not UTF-8 would make the byte count meaningless, so such a file is no text. All of it is decoded
    # before any of it is given out, a block at a time, so that a file of any size takes little memory.
    read = 0
    try:
        for block in _blocks(path, encoding):
            read += len(block)
    except UnicodeDecodeError as error:
        raise NoText(f"not {encoding.upper()} after {read:,} characters") from error
    for number, part in enumerate(_parts(_blocks(path, encoding)), 1):
        yield Document(f"{path}" + f"#{number}" * (number > 1), part)


def _blocks(path: Path, encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


@reader(".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
def jsonl(path: Path, column: str) -> Iterator[Document]:
    """One JSON object a line, its text under `column`."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[column]
            if not isinstance(text, str):
                raise TypeError(f"{column} is no text")
            text.encode("utf-8")
        except KeyError as error:
            raise UserError(
                f"{path}:{number}: no key {column!r}; name the right one with --column"
            ) from error
        except RecursionError as error:
            raise UserError(f"{path}:{number}: nested too deeply") from error
        except UnicodeEncodeError as error:
            raise UserError(
                f"{path}:{number}: {column} holds half a surrogate pair, which no text has"
            ) from error
        except (ValueError, TypeError) as error:  # bad bytes and too many digits are ValueErrors
            raise UserError(f"{path}:{number}: not a JSON object with text ({str(error)[:200]})") from error
        yield Document(f"{path}:{number}", text)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a plain or compressed file. Raises `UserError` where it is damaged, or one does not end."""
    import zstandard

    number = 0
    try:
        with _opened(path) as file:
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) >= LONGEST_LINE and not line.endswith(b"\n"):
                    raise UserError(
                        f"{path}:{number}: a line of more than {LONGEST_LINE >> 20} MiB; cut it up"
                    )
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"{path}: damaged or cut short after line {number} ({error})") from error


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(path))
    if path.suffix == ".zst":
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True))
    return path.open("rb")


@reader(".parquet")
def parquet(path: Path, column: str) -> Iterator[Document]:
    """A parquet file's `column`, a batch of rows at a time."""
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except Exception as error:  # pyarrow has its own exceptions for each kind of damage
        raise UserError(f"{path}: not a parquet file ({' '.join(str(error).split())})") from error
    if column not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise UserError(f"{path}: no column {column!r}, it has {names}; name the right one with --column")
    number, batches = 0, file.iter_batches(batch_size=512, columns=[column])
    while True:
        try:
            values = next(batches).column(0).to_pylist()
        except StopIteration:
            return
        except Exception as error:
            raise UserError(f"{path}: damaged parquet ({' '.join(str(error).split())[:200]})") from error
        for value in values:
            number += 1
            if value is not None:
                yield Document(f"{path}:{number}", str(value))


def _hugging_face(source: str, column: str) -> Iterator[Document]:
    """`hf:NAME[:CONFIG[:SPLIT]]`, streamed from the hub."""
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
            yield Document(f"{source}#{number}", row[column])
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"source {source}: cannot be loaded ({' '.join(str(error).split())[:200]})"
        ) from error
