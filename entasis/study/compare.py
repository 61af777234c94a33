"""Two studies beside each other; bits per byte compare across tokenizers, perplexities do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from entasis.errors import UserError
from entasis.report.tables import Column, Table
from entasis.study import results


def compare(a: Path, b: Path) -> tuple[list[dict[str, Any]], Table, list[str]]:
    """Rows (an arm each), their table, and what to know about it.

    Raises `UserError` for studies without a verdict, or evaluated on texts of different length.
    """
    names = [a.name, b.name] if a.name != b.name else [str(a), str(b)]
    verdicts = [results.verdict_of(folder) for folder in (a, b)]
    finished = [_finished(folder, verdict) for folder, verdict in zip((a, b), verdicts, strict=True)]
    first = [next(iter(f.values()))[0] for f in finished]
    sizes = [(r["validation"]["bytes"], r["validation"]["documents"]) for r in first]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{a} and {b} were evaluated on different texts ({sizes[0][0]:,} bytes in {sizes[0][1]:,} documents, "
            f"{sizes[1][0]:,} in {sizes[1][1]:,}); their scores cannot be compared"
        )
    same_tokenizer = first[0]["data"]["tokenizer"] == first[1]["data"]["tokenizer"]
    rows = []
    for arm in dict.fromkeys([*finished[0], *finished[1]]):
        row: dict[str, Any] = {"arm": arm}
        for letter, runs in zip("ab", finished, strict=True):
            scores = [r["validation"] for r in runs.get(arm, [])]
            row[f"{letter}_runs"] = len(scores)
            row[f"{letter}_bits_per_byte"] = (
                float(np.mean([s["bits_per_byte"] for s in scores])) if scores else None
            )
            if same_tokenizer:
                row[f"{letter}_perplexity"] = (
                    float(np.mean([s["perplexity"] for s in scores])) if scores else None
                )
        both = row["a_bits_per_byte"] is not None and row["b_bits_per_byte"] is not None
        row["difference"] = row["b_bits_per_byte"] - row["a_bits_per_byte"] if both else None
        rows.append(row)
    columns = [Column("arm", "arm")]
    for letter, name in zip("ab", names, strict=True):
        columns += [
            Column(f"{letter}_runs", "runs", "d", name),
            Column(f"{letter}_bits_per_byte", "bits per byte", ".4f", name),
        ]
        if same_tokenizer:
            columns.append(Column(f"{letter}_perplexity", "perplexity", ".3f", name))
    columns.append(Column("difference", "difference", "+.4f", f"{names[1]} − {names[0]}"))
    notes = ["Means of each study's runs, not paired: read no significance into them."]
    if not same_tokenizer:
        notes.append(
            "The tokenizers differ, so perplexities are not shown: they are per token and do not compare."
        )
    return rows, Table(columns, rows), notes


def _finished(folder: Path, verdict: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Results of the main runs, by arm (and protocol where it made another run)."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((folder / "runs").glob("*/seed-*/result.json")):
        found.setdefault(path.parent.parent.name, []).append(results.json_of(path))
    if not found:
        raise UserError(f"{folder}: study {verdict['study']} has no finished run")
    return found
