"""Faults put into a corpus on purpose, to see what they do to training.

    entasis data import corpora/prose/train --format corrupt:int32-read-as-uint16 --output corpora/mistyped/train

The copy says in `corpus.json` what was done to it, and `entasis train` refuses it unless the recipe says
`data.allow_corruption: true`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from entasis.data.corpus import INDEX, TOKENIZER, Corpus
from entasis.data.prepare import totals
from entasis.data.shards import write_shard
from entasis.errors import UserError
from entasis.files import write_json

PREFIX = "corrupt:"
Corruption = Callable[[np.ndarray], np.ndarray]
CORRUPTIONS: dict[str, Corruption] = {}


def corruption(name: str) -> Callable[[Corruption], Corruption]:
    """Registers `ids -> what they are mistaken for`, always the same number of ids for one."""

    def add(mistake: Corruption) -> Corruption:
        CORRUPTIONS[name] = mistake
        return mistake

    return add


@corruption("int32-read-as-uint16")
def int32_read_as_uint16(ids: np.ndarray) -> np.ndarray:
    """Two ids for each: the low half, and the high half, which is zero. What happened in arXiv 2509.06518."""
    return np.ascontiguousarray(ids, "<i4").view("<u2")


def corrupt(source: str | Path, output: str | Path, name: str) -> dict[str, Any]:
    """Writes `output`, the corpus `source` with its ids mistaken; returns what it holds.

    Documents keep their text's bytes, so that bits per byte of the two corpora compare. Raises `UserError`.
    """
    if name not in CORRUPTIONS:
        raise UserError(f"corruption {name!r} is not known; choose one of {', '.join(CORRUPTIONS)}")
    corpus, output = Corpus(source), Path(output)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output}: not empty; name another folder")
    output.mkdir(parents=True, exist_ok=True)
    shards = {}
    for shard in corpus.shards:
        ids = CORRUPTIONS[name](np.asarray(shard.tokens))
        shards[shard.path.name] = write_shard(
            output / shard.path.name,
            ids,
            np.asarray(shard.documents) * (len(ids) // len(shard.tokens)),
            np.asarray(shard.document_bytes),
            vocabulary=corpus.vocabulary,
            tokenizer_hash=corpus.tokenizer_hash,
            document_hashes=shard.document_hashes,
        )
    shutil.copy(corpus.tokenizer_path, output / TOKENIZER)
    index = {
        "shards": shards,
        "vocabulary": corpus.vocabulary,
        "tokenizer": corpus.tokenizer_hash,
        "end_of_text": corpus.end_of_text,
        "text_lost": corpus.text_lost,
        "corruption": name,
    }
    write_json(output / INDEX, index)
    return {"output": str(output), "corruption": name, **totals(output)}
