"""A new folder that appears when it is whole, or not at all.

It is written under a name of its own beside the target, so nothing that is there is touched, and renamed at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from entasis import files


@contextlib.contextmanager
def new_folder(target: Path, need: int | None) -> Iterator[Path]:
    """An empty folder to fill, which becomes `target` when the block ends; an empty folder there is replaced.

    When the block fails, what was written is removed. Raises `DiskFull`; `need` is about how many bytes it has to hold,
    for the message, where that is known.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", suffix=".partial", dir=target.parent))
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                files.sync(file)
        aside.chmod(0o777 & ~_umask())
        # Fails where something came to be in the target meanwhile.
        aside.rename(target)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if files.is_disk_full(error):
            raise files.no_space(target, error, need=need) from error
        raise
    files.sync(target.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
