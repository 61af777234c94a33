"""Runs measures on a model and a text: `dissect` gives their values as one tidy frame."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from entasis.anatomy import text as texts
from entasis.anatomy.measures import Measure, choose, leave_out_impossible
from entasis.anatomy.subject import Subject
from entasis.data.sources import COLUMN
from entasis.errors import UserError
from entasis.evaluate.loading import Loaded, load
from entasis.files import write_text

DEFAULT = ("structure", "skip")
TOKENS = 20_000
SEQUENCE = 512
COLUMNS = ["measure", "quantity", "layer", "target", "value", "low", "high", "p"]

Progress = Callable[[str, int, int], object]
"""Called with a measure's name, its work done and all its work."""


def dissect(
    model: str | Path | Loaded,
    text: texts.TextInput,
    measures: Sequence[str] = DEFAULT,
    *,
    tokens: int = TOKENS,
    sequence: int | None = None,
    column: str = COLUMN,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """One row for each value: measure, quantity, layer (NA: the whole model), target, value, low, high, p.

    `measures` are names of measures or of kinds of them, or `all`; the loss is always among them. `text` is a corpus,
    a file, a folder, or a list of documents; `column` is the text's key in JSONL and Parquet. `low` and `high` are 95 % intervals over documents, `p` is adjusted by
    Holm over the layers. `layers` are those that are ablated, manipulated and trained, without it all. With `precision`
    bf16 the text goes through bf16 products. With an `output` folder each measure is stored as it is done, and not
    done again. Raises `UserError` for measures that are unknown or have no value for any layer, unreadable input, and a
    folder that holds another dissection.
    """
    chosen = choose(["loss", *measures])
    loaded = model if isinstance(model, Loaded) else load(model, dtype=torch.float32)
    chosen = leave_out_impossible(chosen, measures, loaded.shape)
    subject = prepare_subject(
        loaded,
        text,
        tokens=tokens,
        sequence=sequence,
        column=column,
        seed=seed,
        layers=layers,
        precision=precision,
    )
    return run_measures(subject, chosen, output=output, progress=progress)


def prepare_subject(
    loaded: Loaded,
    text: texts.TextInput,
    *,
    tokens: int = TOKENS,
    sequence: int | None = None,
    column: str = COLUMN,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    precision: str = "fp32",
) -> Subject:
    """Reads the text and checks it against the model. Raises `UserError`."""
    if tokens < 2:
        raise UserError(f"--tokens is {tokens}; it must be at least 2")
    longest = loaded.shape.context if loaded.shape.positions == "learned" else None
    sequence = sequence or min(SEQUENCE, loaded.shape.context)
    if sequence < 1 or (longest and sequence > longest):
        raise UserError(
            f"--sequence is {sequence}; it must be at least 1 and at most the model's {longest or 'context'}"
        )
    read = texts.read(text, loaded.tokenizer, tokens=tokens, sequence=sequence, column=column)
    if int(read.stream.max()) >= loaded.shape.vocabulary:
        raise UserError(
            f"{text}: has token {int(read.stream.max())}, the model's vocabulary is {loaded.shape.vocabulary}"
        )
    n = loaded.shape.n_layers
    if wrong := [layer for layer in layers or () if not 0 <= layer < n]:
        raise UserError(f"--layers has {wrong[0]}; the model's layers are 0 to {n - 1}")
    if loaded.document_masking:
        said = "the model was trained with document_masking, which anatomy does not know: it reads without"
        print(f"entasis: {said}", file=sys.stderr)
    only = None if layers is None else frozenset(layers)
    return Subject(loaded.model.eval(), read, seed, only, precision)


def run_measures(
    subject: Subject,
    measures: Sequence[Measure],
    *,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Runs the measures that the folder does not hold yet; the frame has all of `measures`."""
    if output is not None:
        subject.folder = Path(output)
        _claim_folder(subject)
    rows: list[dict[str, Any]] = []
    for m in measures:
        if progress:
            subject.progress = lambda done, total, name=m.name: progress(name, done, total)  # type: ignore[misc]
        stored = None if subject.folder is None else subject.folder / "measures" / f"{m.name}.json"
        if stored and stored.is_file():
            found = json.loads(stored.read_text(encoding="utf-8"))
        else:
            found = [dataclasses.asdict(row) for row in m.function(subject)]
            if stored:
                write_text(stored, json.dumps([_without_nan(r) for r in found], indent=0) + "\n")
        rows += [{"measure": m.name, **row} for row in found]
    frame = pd.DataFrame(rows, columns=COLUMNS).astype({"layer": "Int64", "target": "string"})
    return frame.astype(dict.fromkeys(["value", "low", "high", "p"], "float64"))


def describe(subject: Subject) -> dict[str, Any]:
    """What the values depend on."""
    return {
        "model": hash_weights(subject.model),
        "text": subject.text.fingerprint,
        "tokens": subject.text.tokens,
        "documents": len(subject.text.names),
        "bytes": int(subject.text.document_bytes.sum()),
        "sequence": subject.text.sequence,
        "seed": subject.seed,
        "layers": subject.n_layers,
        "only": None if subject.only is None else subject.chosen,
        "precision": subject.precision,
    }


def hash_weights(model: torch.nn.Module) -> str:
    """A hash of the weights: changes with any value, name or dtype."""
    digest = hashlib.blake2b(digest_size=16)
    for name, p in model.named_parameters():
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _claim_folder(subject: Subject) -> None:
    """Marks the folder as this dissection's. Raises `UserError` if it holds another one."""
    assert subject.folder is not None
    file, mine = subject.folder / "subject.json", describe(subject)
    if file.is_file():
        earlier = json.loads(file.read_text(encoding="utf-8"))
        for name, value in mine.items():
            if earlier.get(name) != value:
                raise UserError(
                    f"{subject.folder}: holds a dissection with {name} {earlier.get(name)}, not {value}; "
                    "name another folder"
                )
        return
    if subject.folder.exists() and any(subject.folder.iterdir()):
        raise UserError(f"{subject.folder}: not empty and not a dissection; name another folder")
    write_text(file, json.dumps(mine, indent=1) + "\n")


def to_records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The frame's rows as plain values for JSON, all digits of them; what is missing is None."""
    plain = frame.astype(object).where(frame.notna(), None)
    return [_without_nan(dict(zip(plain.columns, row, strict=True))) for row in plain.to_numpy().tolist()]


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
