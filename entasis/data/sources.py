"""Where documents come from: one registered reader for each kind of source, each streaming."""

from __future__ import annotations

import gzip
import io
import json
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from entasis.errors import UserError

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".h", ".html", ".tex", ".text", ""}
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


def documents(sources: Sequence[str | Path], column: str = "text") -> Iterator[Document]:
    """All documents of all sources, in a fixed order. Empty ones are left out. Raises `UserError`."""
    for source in sources:
        if str(source).startswith("hf:"):
            found = _hugging_face(str(source), column)
        else:
            found = _of_files(source, column)
        for document in found:
            if document.text:
                yield document


def _of_files(source: str | Path, column: str) -> Iterator[Document]:
    """Documents of a file, a folder or `stdlib`, named from there: the same on any machine, wherever it lies."""
    root = Path(sysconfig.get_paths()["stdlib"]) if str(source) == "stdlib" else Path(source)
    for path in files([source]):
        name = str(path.relative_to(root)) if path != root else path.name
        for document in _reader_of(path)(path, column):
            yield Document(name + document.name.removeprefix(str(path)), document.text)


def files(sources: Sequence[str | Path]) -> list[Path]:
    """The files of sources that are files, folders (searched, in order of name) or `stdlib`."""
    result: list[Path] = []
    for source in sources:
        path = Path(source)
        if str(source) == "stdlib":
            result += _stdlib()
        elif path.is_dir():
            inside = (p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith("."))
            result += [p for p in inside if _ending(p) or p.suffix.lower() in TEXT_SUFFIXES]
        elif path.is_file():
            result.append(path)
        else:
            raise UserError(f"source {source}: no such file or folder (stdlib and hf:NAME are known too)")
    return result


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


def _text(path: Path, column: str) -> Iterator[Document]:
    # Bytes that are not UTF-8 would make the byte count meaningless, so such a file is no text.
    try:
        yield Document(str(path), path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        return


@reader(".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
def jsonl(path: Path, column: str) -> Iterator[Document]:
    """One JSON object a line, its text under `column`."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[column]
                if not isinstance(text, str):
                    raise TypeError(f"{column} is no text")
                yield Document(f"{path}:{number}", text)
            except KeyError as error:
                raise UserError(
                    f"{path}:{number}: no key {column!r}; name the right one with --column"
                ) from error
            except (json.JSONDecodeError, TypeError) as error:
                raise UserError(f"{path}:{number}: not a JSON object with text ({error})") from error


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        import zstandard

        return io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(path.open("rb")), encoding="utf-8")
    return path.open(encoding="utf-8")


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
    number = 0
    for batch in file.iter_batches(batch_size=512, columns=[column]):
        for value in batch.column(0).to_pylist():
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
