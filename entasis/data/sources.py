"""Where documents come from: files, folders, the standard library and data sets of the hub, in a fixed order."""

from __future__ import annotations

import os
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from entasis.data.corpus import INDEX
from entasis.data.readers import (
    UNREADABLE,
    Document,
    EncodingErrors,
    Losses,
    SourceFile,
    ending,
    hugging_face,
    read,
)
from entasis.errors import UserError

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".h", ".html", ".tex", ".text", ""}
UNKNOWN_SUFFIX, HIDDEN, EXCLUDED, NO_FILE = (
    "unknown suffix",
    "hidden",
    "excluded",
    "no file, or a broken link",
)
COLUMN = "text"
"""The column that is read where none is named."""
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


def is_corpus(source: str | Path, column: str = COLUMN) -> bool:
    """Whether it is a prepared corpus. Raises `UserError` for a column of one, which has none."""
    found = (Path(source) / INDEX).is_file()
    if found and column != COLUMN:
        raise UserError(f"--column {column}: {source} is a prepared corpus, which has no columns")
    return found


@dataclass(frozen=True)
class TextSources:
    """What is to be read, and how: the arguments of `entasis data prepare` that decide it."""

    sources: tuple[str, ...]
    """Files, folders, `stdlib`, and `hf:NAME[:CONFIG[:SPLIT]]`."""
    column: str = COLUMN
    include: tuple[str, ...] = ()
    """Globs; in folders only files that match one are read, whatever their suffix."""
    exclude: tuple[str, ...] = ()
    encoding_errors: EncodingErrors = "drop-file"

    def documents(self, losses: Losses | None = None) -> Iterator[Document]:
        """All documents, in a fixed order. What is left out is added to `losses`. Raises `UserError`."""
        if self.column != COLUMN and not self._have_rows(self.state()):
            raise UserError(f"--column {self.column}: no source has columns; jsonl, parquet and hf:NAME do")
        losses = Losses() if losses is None else losses
        for source in self.sources:
            if source.startswith("hf:"):
                yield from hugging_face(source, self.column, losses)
            else:
                for file in self._files(source, losses):
                    yield from read(file)

    def state(self) -> dict[str, list[int]]:
        """Size and time of every file that would be read, by its path: equal where nothing has changed."""
        result = {}
        for source in self.sources:
            for file in () if source.startswith("hf:") else self._files(source, Losses()):
                status = file.path.stat()
                result[str(file.path)] = [status.st_size, status.st_mtime_ns]
        return result

    def size(self) -> int:
        """Bytes of the files; 0 where rows, compression or the hub keep the size of the text unknown until it is read."""
        files = self.state()
        return 0 if self._have_rows(files) else sum(size for size, _ in files.values())

    def _have_rows(self, files: Iterable[str]) -> bool:
        """Whether any source or file is made of rows, which have columns."""
        return any(s.startswith("hf:") for s in self.sources) or any(ending(Path(f)) for f in files)

    def _files(self, source: str, losses: Losses) -> Iterator[SourceFile]:
        """The files of a source, in order of name."""

        def file(path: Path, name: str, named: bool = False) -> SourceFile:
            return SourceFile(path, name, named, self.column, self.encoding_errors, losses)

        root = Path(source)
        if source == "stdlib":
            root, found = Path(sysconfig.get_paths()["stdlib"]), _stdlib()
        elif root.is_dir():
            found = _walk(root, lambda path, why: losses.add(why, _relative(path, root), 0))
        elif root.is_file():
            yield file(root, root.name, named=True)
            return
        else:
            raise UserError(f"source {source}: no such file or folder (stdlib and hf:NAME are known too)")
        for path in found:
            one = file(path, _relative(path, root))
            if reason := self._reason_against(path, one.name):
                one.lose(reason)
            else:
                yield one

    def _reason_against(self, path: Path, name: str) -> str | None:
        """Why a file of a folder is left out before it is opened, None where it is not."""

        def matches(globs: tuple[str, ...]) -> bool:
            return any(fnmatchcase(name, glob) or fnmatchcase(path.name, glob) for glob in globs)

        if path.name.startswith("."):
            return HIDDEN
        if matches(self.exclude) or (self.include and not matches(self.include)):
            return EXCLUDED
        known = self.include or ending(path) or path.suffix.lower() in TEXT_SUFFIXES
        return None if known else UNKNOWN_SUFFIX


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root))


def _walk(root: Path, lose: Callable[[Path, str], None]) -> list[Path]:
    """The files below a folder, in order of name. Links are followed, each real folder and file taken once."""
    seen: set[str] = set()
    found: list[Path] = []
    waiting = [str(root)]
    links: list[Path] = []

    def refused(error: OSError) -> None:
        lose(Path(error.filename), UNREADABLE)

    while waiting:
        for folder, inside, names in os.walk(waiting.pop(0), onerror=refused):
            if (real := os.path.realpath(folder)) in seen:
                inside.clear()
                continue
            seen.add(real)
            inside.sort()
            for hidden in [n for n in inside if n.startswith(".")]:
                inside.remove(hidden)
                lose(Path(folder, hidden), HIDDEN)
            # os.path, which raises nothing in a folder that may be listed and not entered.
            waiting += sorted(p for n in inside if os.path.islink(p := str(Path(folder, n))))  # noqa: PTH114
            for path in (Path(folder, n) for n in sorted(names)):
                if reason := _reason_against_opening(path):
                    lose(path, reason)
                elif path.is_symlink():
                    links.append(path)
                else:
                    found.append(path)
    real_files = {os.path.realpath(p) for p in found} if links else set()
    for path in sorted(links):
        if (real := os.path.realpath(path)) not in real_files:
            real_files.add(real)
            found.append(path)
    return sorted(found)


def _reason_against_opening(path: Path) -> str | None:
    """Why what a folder lists is no file to be read, None where it is one."""
    try:
        return None if stat.S_ISREG(path.stat().st_mode) else NO_FILE
    except PermissionError:
        return UNREADABLE
    except OSError:
        return NO_FILE


def _stdlib() -> list[Path]:
    """The Python source of the running interpreter's own standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = (p for p in sorted(root.rglob("*.py")) if not _NOT_STDLIB & set(p.relative_to(root).parts))
    result = list(found)
    if not result:
        raise UserError(f"source stdlib: this interpreter has no source files under {root}")
    return result
