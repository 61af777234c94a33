"""Files that are whole or not there, and one line where a disk is full or a file is damaged.

Everything is written aside, synced and renamed. JSON that others rely on is sealed: it holds a hash of the rest of
itself, so that a changed digit is noticed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from entasis.errors import Damaged, DiskFull, UserError

SEAL = "hash"
"""The key of a sealed JSON file that holds the hash of the others."""


@contextlib.contextmanager
def aside(path: Path, *, need: int | None = None, locked: bool = False) -> Iterator[Path]:
    """Gives a path to write to, which becomes `path` when the block ends well and is removed when it does not.

    `need` is the size in bytes, for the message. In a folder that is `locked` to this process the name is
    `NAME.partial`, so that a killed write leaves one file that the next replaces; elsewhere it is one that nobody else
    uses. Its mode is that of any new file (safetensors would keep it from all but its owner). Raises `DiskFull`; an
    earlier `path` is then untouched.
    """
    token = "" if locked else f".{secrets.token_hex(4)}"
    partial = path.with_name(f"{path.name}{token}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        yield partial
        partial.chmod(mode)
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if is_disk_full(error) and not isinstance(error, DiskFull):
            raise no_space(path, error, need=need) from error
        raise


@contextlib.contextmanager
def new_folder(path: Path, *, need: int | None = None) -> Iterator[Path]:
    """Gives an empty folder to fill, which becomes `path` when the block ends well and is removed when it does not.

    An empty folder at `path` is replaced; one that is not makes it fail. `need` is the size in bytes, for the message.
    Raises `DiskFull`, and `UserError` for the folder that the process is in.
    """
    path = path.resolve()
    if path == Path.cwd():
        raise UserError(f"{path}: is the folder you are in; name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                sync(file)
        partial.rename(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error) and not isinstance(error, DiskFull):
            raise no_space(path, error, need=need) from error
        raise
    sync(path.parent)


@contextlib.contextmanager
def temporary_space(need: int) -> Iterator[None]:
    """Inside, where nothing but temporary files is written, a full disk is that of the temporary folder.

    `need` is the size in bytes, for the message. Raises `DiskFull`.
    """
    try:
        yield
    except Exception as error:
        if is_disk_full(error) and not isinstance(error, DiskFull):
            raise _no_temporary_space(error, need) from error
        raise


def check_temporary(need: int) -> None:
    """Raises `DiskFull` where the temporary folder has no room for so many bytes."""
    if shutil.disk_usage(tempfile.gettempdir()).free < need:
        raise _no_temporary_space(OSError(), need)


def on_temporary_disk(path: Path) -> bool:
    """Whether what is written at `path`, which is there, takes room from temporary files."""
    return path.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev


def write_bytes(path: Path, content: bytes, *, locked: bool = False) -> None:
    """Writes a file so that nobody ever reads half of it; see `aside`."""
    with aside(path, need=len(content), locked=locked) as partial, partial.open("wb") as file:
        file.write(content)


def write_text(path: Path, text: str, *, locked: bool = False) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode(), locked=locked)


def write_json(path: Path, content: Mapping[str, Any], *, locked: bool = False) -> dict[str, Any]:
    """Writes `content` sealed; returns it with its seal, as `read_json` gives it."""
    sealed = {**content, SEAL: _seal(content)}
    write_text(path, json.dumps(sealed, indent=1) + "\n", locked=locked)
    return sealed


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises `Damaged` where it is none, or where its seal (if it has one) is broken."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        what = "is empty" if path.stat().st_size == 0 else "is no longer JSON, or cut short"
        raise Damaged(f"damaged: {path} {what}") from error
    if not isinstance(content, dict):
        raise Damaged(f"damaged: {path} holds no mapping")
    if SEAL in content and content[SEAL] != _seal({k: v for k, v in content.items() if k != SEAL}):
        raise Damaged(f"damaged: {path} was changed after it was written")
    return content


def hash_of(path: Path, *, first: int | None = None) -> str:
    """SHA-256 of a file, or of its `first` bytes."""
    with path.open("rb") as file:
        if first is not None:
            return hashlib.sha256(file.read(first)).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Makes a file's content (or a folder's list of names) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Not every file system lets a folder be synced.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk, quota or file-size limit is behind an exception.

    torch wraps it (CheckpointException has the errors of all ranks in `failures`, its zip writer raises another error
    while handling it), and safetensors and numpy's tofile tell it in words only.
    """
    while error is not None:
        wrapped = getattr(error, "failures", None)
        if isinstance(wrapped, Mapping) and any(is_disk_full(found[0]) for found in wrapped.values()):
            return True
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if isinstance(error, OSError) and re.fullmatch(r"\d+ requested and \d+ written", str(error)):
            return True
        if type(error).__name__ == "SafetensorError" and any(f"(os error {n})" in str(error) for n in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def no_space(
    path: Path, error: BaseException, *, need: int | None = None, then: str = "try again"
) -> DiskFull:
    """The one line about a full disk: where, how much is needed and free, and what to do (`then`)."""
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    room = [f"{format_bytes(need)} needed"] if need else []
    with contextlib.suppress(OSError):
        room.append(f"{format_bytes(shutil.disk_usage(place).free)} free")
    if "too large" in _words(error).lower():
        cause, cure = "a file would be larger than allowed here (ulimit -f)", "raise the limit"
    else:
        cause, cure = "no space left", "free some"
    full = DiskFull(f"{cause} on the disk of {path} ({', '.join(room)}); {cure} and {then}")
    full.errno = errno.ENOSPC
    return full


def _no_temporary_space(error: BaseException, need: int) -> DiskFull:
    then = "try again, or name another folder for temporary files with TMPDIR"
    return no_space(Path(tempfile.gettempdir()), error, need=need, then=then)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _words(error: BaseException | None) -> str:
    """The texts of an exception and all that is behind it."""
    texts = []
    while error is not None:
        texts.append(str(error))
        wrapped = getattr(error, "failures", None)
        if isinstance(wrapped, Mapping):
            texts += [_words(found[0]) for found in wrapped.values()]
        error = error.__cause__ or error.__context__
    return " ".join(texts)


def format_bytes(n: float) -> str:
    """`1.61 GB`: three digits, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def _seal(content: Mapping[str, Any]) -> str:
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()[:32]
