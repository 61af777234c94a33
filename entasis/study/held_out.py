"""All arms of a study are judged on the same documents, whatever tokenizer each of them reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from entasis import quantities
from entasis.data.corpus import Corpus
from entasis.data.held_out import choose_documents
from entasis.errors import UserError
from entasis.study.arms import Arm
from entasis.study.config import Study, changed


def agree(study: Study, folder: Path, arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """The arms, their held-out documents limited by bytes of text where they have corpora of different tokenizers.

    Raises `UserError` for an arm that has no held-out corpus, or would be judged on other documents than the baseline.
    Corpora that are not prepared yet are looked at when they are.
    """
    every = dict(arms)  # a trunk is judged on nothing
    arms = {name: every[name] for name in study.arms}
    for name, arm in arms.items():
        if not arm.recipe["data"].get("validation"):
            raise UserError(f"study {study.name}: arm {name} has no data.validation to be judged on")
        if not isinstance(arm.recipe["data"]["validation"], str):
            raise UserError(
                f"study {study.name}: arm {name} has several corpora in data.validation; a study judges on one"
            )
    if study.sweep:
        for path in {_path(arm) for arm in arms.values()}:
            if (folder / path / "corpus.json").is_file():
                choose_documents(Corpus(folder / path), part="selection")  # refused where there are too few
    base = arms[study.baseline]
    if all(_wanted(arm) == _wanted(base) for arm in arms.values()):
        return every
    if not all((folder / _path(arm) / "corpus.json").is_file() for arm in arms.values()):
        return every
    corpora = {path: Corpus(folder / path) for path in {_path(arm) for arm in arms.values()}}
    if limit := _evaluation(base).get("tokens"):
        corpus = corpora[_path(base)]
        limit = round(quantities.count(limit, "evaluation.tokens") * corpus.bytes / corpus.tokens)
        for name, arm in arms.items():
            if _evaluation(arm).get("tokens") == _evaluation(base)["tokens"]:
                recipe = changed(arm.recipe, {"evaluation.tokens": None, "evaluation.bytes": limit})
                arms[name] = dataclasses.replace(arm, recipe=recipe)
    theirs = _documents(corpora[_path(base)], arms[base.name])
    for arm in arms.values():
        own = _documents(corpora[_path(arm)], arm)
        if not np.array_equal(own, theirs):
            raise UserError(
                f"study {study.name}: arm {arm.name} would be judged on {len(own)} documents ({own['bytes'].sum():,} "
                f"bytes), {base.name} on {len(theirs)} ({theirs['bytes'].sum():,}), {len(np.intersect1d(own, theirs))} of "
                "them the same; prepare both corpora from the same sources, and give both the same evaluation"
            )
    return every | arms


def _evaluation(arm: Arm) -> dict[str, Any]:
    return arm.recipe.get("evaluation") or {}


def _path(arm: Arm) -> str:
    return str(arm.recipe["data"]["validation"])


def _wanted(arm: Arm) -> tuple[str, dict[str, Any]]:
    return _path(arm), {k: v for k, v in _evaluation(arm).items() if k != "every"}


def _documents(corpus: Corpus, arm: Arm) -> np.ndarray:
    """Hash and bytes of each document that the arm is judged on, in the order of the hashes."""
    limits = {k: _evaluation(arm).get(k) for k in ("tokens", "bytes")}
    numbers = {k: None if v is None else quantities.count(v, f"evaluation.{k}") for k, v in limits.items()}
    chosen = choose_documents(
        corpus,
        numbers["tokens"],
        max_bytes=numbers["bytes"],
        part=_evaluation(arm).get("part", "all"),
    )
    rows = np.zeros(len(chosen), [("hash", "<u8"), ("bytes", "<i8")])
    rows["hash"], rows["bytes"] = corpus.document_hashes[chosen], corpus.document_bytes()[chosen]
    return np.sort(rows)
