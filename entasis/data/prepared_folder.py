"""The folder of a preparation: whose it is, and whether its sources are still what they were."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entasis.errors import UserError
from entasis.files import read_json, write_json

ARGUMENTS, SOURCES, PREPARED = "arguments.json", "sources.json", "prepared.json"
WORK, SURVEY = ".work", ".work/survey.npy"
_ADDED: dict[str, Any] = {"include": [], "exclude": [], "encoding_errors": "drop-file"}
"""Arguments that earlier versions did not have, and what they did."""


def claim(
    output: Path, arguments: Mapping[str, Any], state: Mapping[str, Any], parts: tuple[str, ...]
) -> tuple[Path, str | None]:
    """The folder that answers or is to be filled, and what is to be said about it.

    It is `output`, or, where `state` (see `TextSources.state`) is no longer that of a finished preparation in it, the
    first `output-2`, `output-3` … in which it is. Raises `UserError` where `output` holds something else.
    """
    said = None
    for number in itertools.count(1):
        folder = output if number == 1 else output.with_name(f"{output.name}-{number}")
        ours = (folder / ARGUMENTS).is_file()
        if not ours and folder.exists() and not _is_free(folder):
            if folder == output:
                raise UserError(f"{output}: not empty and not a corpus; name another folder")
            continue
        if not ours or not any((folder / name).exists() for name in (PREPARED, SURVEY, *parts)):
            folder.mkdir(parents=True, exist_ok=True)
            # First, should this be killed: it says whose the folder is.
            write_json(folder / ARGUMENTS, arguments)
            write_json(folder / SOURCES, {"files": state})
            return folder, said and f"{said}; prepared anew in {folder}"
        if differs := _difference(read_json(folder / ARGUMENTS), arguments):
            if folder == output:
                raise UserError(f"{output}: prepared with {differs}; name another folder")
            continue
        change = _change(folder, state)
        if change is None:
            return folder, said and f"{said}; {folder} is the corpus of what they are now"
        if not (folder / PREPARED).is_file():
            for part in (WORK, *parts):
                shutil.rmtree(folder / part, ignore_errors=True)
            write_json(folder / SOURCES, {"files": state})
            return folder, f"{folder}: its sources changed before it was finished ({change}); it begins again"
        said = f"{output}: its sources have changed since ({change})"
    raise AssertionError


def _is_free(folder: Path) -> bool:
    """Whether a folder is empty, but for what a killed write of `ARGUMENTS` may have left."""
    return folder.is_dir() and all(
        file.name.startswith(f"{ARGUMENTS}.") and file.suffix == ".partial" for file in folder.iterdir()
    )


def _difference(earlier: Mapping[str, Any], arguments: Mapping[str, Any]) -> str | None:
    for name, value in arguments.items():
        was = earlier.get(name, _ADDED.get(name))
        if was != value:
            return f"{name} {was!r}, not {value!r}"
    return None


def _change(folder: Path, state: Mapping[str, Any]) -> str | None:
    """How the sources differ from those that a folder was prepared from, in words; None where they do not.

    Folders of earlier versions do not say what their sources were.
    """
    if not (folder / SOURCES).is_file():
        return None
    then = read_json(folder / SOURCES)["files"]
    kinds = {
        "changed": [name for name, seen in state.items() if name in then and then[name] != seen],
        "new": [name for name in state if name not in then],
        "gone": [name for name in then if name not in state],
    }
    told = [f"{len(names):,} {kind}: {names[0]}" for kind, names in kinds.items() if names]
    return ", ".join(told) or None
