"""The corpora that a study makes for itself, in its own folder, before anything runs."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entasis.data.prepare import prepare
from entasis.errors import UserError
from entasis.study.definition import Corpus, Study

STDLIB = "python-stdlib"
_NOT_STDLIB = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "lib2to3",
    "idle_test",
    "turtledemo",
}


def stdlib_files() -> list[Path]:
    """The Python source of the interpreter's own standard library, without its tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not _NOT_STDLIB & set(p.relative_to(root).parts))
    if not files:
        raise UserError(f"{STDLIB}: this interpreter has no source files under {root}")
    return files


def missing(study: Study, folder: Path) -> list[str]:
    """Names of the corpora that are not there yet."""
    return [name for name in study.corpora if not (_home(folder, name) / "train" / "corpus.json").is_file()]


def make(study: Study, folder: Path, progress: Callable[..., Any] | None = None) -> None:
    """Prepares what is missing: split by file, near-duplicate files kept on one side."""
    for name in missing(study, folder):
        _make(study.corpora[name], _home(folder, name), progress)


def _make(corpus: Corpus, output: Path, progress: Callable[..., Any] | None) -> None:
    sources: list[Path | str] = []
    for source in corpus.sources:
        sources += stdlib_files() if source == STDLIB else [source]
    prepare(
        sources,
        output,
        tokenizer=corpus.tokenizer,
        train_tokenizer=corpus.train_tokenizer,
        validation=corpus.validation,
        progress=progress,
    )


def _home(folder: Path, name: str) -> Path:
    return folder / "corpora" / name
