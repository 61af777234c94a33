"""The corpora that a study makes for itself, in its own folder, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from entasis.data import corruption
from entasis.data.prepare import Progress, prepare
from entasis.files import write_json
from entasis.study.config import Study


def missing(study: Study, folder: Path) -> list[str]:
    """Names of the corpora that are not whole yet."""
    return [name for name in study.corpora if not (folder / "corpora" / name / "prepared.json").is_file()]


def make(study: Study, folder: Path, progress: Progress | None = None) -> dict[str, dict[str, Any]]:
    """Prepares what is missing: split by file, near-duplicate files kept on one side.

    Returns what was left out of each corpus, by reason.
    """
    left_out = {}
    for name in missing(study, folder):
        corpus = study.corpora[name]
        if corpus.copy_of:
            parts = ("train", "validation")
            made = {
                part: corruption.corrupt(
                    folder / "corpora" / corpus.copy_of / part,
                    folder / "corpora" / name / part,
                    str(corpus.corruption),
                )
                for part in parts
            }
            write_json(folder / "corpora" / name / "prepared.json", made)
            continue
        result = prepare(
            corpus.sources,
            folder / "corpora" / name,
            tokenizer=corpus.tokenizer,
            train_tokenizer=corpus.train_tokenizer,
            validation=corpus.validation,
            limit=corpus.limit,
            progress=progress,
        )
        left_out[name] = result["left_out"]
    return left_out
