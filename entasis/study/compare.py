"""Two studies beside each other; bits per byte compare across tokenizers, perplexities do not.

The differences between the recipes that were run come first: a comparison of scores means nothing without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from entasis.errors import UserError
from entasis.report.tables import Column, Table
from entasis.study import growth, results, verdict
from entasis.study.config import Study
from entasis.train.resolved_recipe import read_stored

_ELSEWHERE = {"name", "title", "base", "arms", "trunks", "corpora"}
"""Of a study what is a name, or stands in the recipes of its runs."""
Runs = dict[str, list[tuple[Path, dict[str, Any]]]]
"""Folder and result of the finished main runs of each arm (and protocol where it made another run)."""


def compare(a: Path, b: Path) -> tuple[dict[str, Any], Table, list[str]]:
    """What differs and the scores of each arm as plain data, the scores' table, and lines that say what differs.

    Raises `UserError` for studies without a verdict, or evaluated on texts of different length.
    """
    names = [a.name, b.name] if a.resolve().name != b.resolve().name else [str(a), str(b)]
    verdicts = [verdict.read(folder) for folder in (a, b)]
    finished = [_finished(folder, v.study) for folder, v in zip((a, b), verdicts, strict=True)]
    first = [next(iter(runs.values()))[0][1] for runs in finished]
    sizes = [(r["validation"]["bytes"], r["validation"]["documents"]) for r in first]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{a} and {b} were evaluated on different texts ({sizes[0][0]:,} bytes in {sizes[0][1]:,} documents, "
            f"{sizes[1][0]:,} in {sizes[1][1]:,}); their scores cannot be compared"
        )
    same_tokenizer = first[0]["data"]["tokenizer"] == first[1]["data"]["tokenizer"]
    rows = [_row(arm, finished, same_tokenizer) for arm in dict.fromkeys([*finished[0], *finished[1]])]
    differences = list(_differences([growth.stored(folder) for folder in (a, b)], finished))
    notes = [f"A is {names[0]}, B is {names[1]}."]
    notes += [f"{d['what']}: {_shown(d['a'])} in A, {_shown(d['b'])} in B{_of(d)}" for d in differences]
    if not differences:
        notes.append("Both say the same: arms, seeds, data and every setting.")
    notes.append("Means of each study's runs, not paired: read no significance into them.")
    if not same_tokenizer:
        notes.append(
            "The tokenizers differ, so perplexities are not shown: they are per token and do not compare."
        )
    return {"differences": differences, "arms": rows}, _table(rows, same_tokenizer), notes


def _row(arm: str, finished: list[Runs], same_tokenizer: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": arm}
    for letter, runs in zip("ab", finished, strict=True):
        scores = [result["validation"] for _, result in runs.get(arm, [])]
        row[f"{letter}_runs"] = len(scores)
        for key in ("bits_per_byte", "perplexity") if same_tokenizer else ("bits_per_byte",):
            row[f"{letter}_{key}"] = float(np.mean([s[key] for s in scores])) if scores else None
    both = row["a_bits_per_byte"] is not None and row["b_bits_per_byte"] is not None
    row["difference"] = row["b_bits_per_byte"] - row["a_bits_per_byte"] if both else None
    return row


def _table(rows: list[dict[str, Any]], same_tokenizer: bool) -> Table:
    columns = [
        Column("arm", "arm"),
        *(Column(f"{x}_runs", "runs", "d", x.upper()) for x in "ab"),
        *(Column(f"{x}_bits_per_byte", "bits/byte", ".4f", x.upper()) for x in "ab"),
        Column("difference", "difference", "+.4f", "B − A"),
    ]
    if same_tokenizer:
        columns += [Column(f"{x}_perplexity", "perpl.", ".3f", x.upper()) for x in "ab"]
    return Table(columns, rows)


def _differences(studies: list[Study], finished: list[Runs]) -> Iterator[dict[str, Any]]:
    """What differs: `what`, its values `a` and `b`, and `arms`, those in which it does (null: it is the study's)."""
    asked = [{**study.model_dump(exclude=_ELSEWHERE), **_trunks(study)} for study in studies]
    for key in {**asked[0], **asked[1]}:
        theirs = [of.get(key) for of in asked]
        if theirs[0] != theirs[1]:
            yield {"what": key, "a": theirs[0], "b": theirs[1], "arms": None}
    arms = [list(runs) for runs in finished]
    only = [[arm for arm in arms[i] if arm not in arms[1 - i]] for i in (0, 1)]
    if only[0] or only[1]:
        yield {"what": "arms of its own", "a": only[0], "b": only[1], "arms": None}
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    shared = [arm for arm in arms[0] if arm in finished[1]]
    for arm in shared:
        a, b = (_settings(*runs[arm][0]) for runs in finished)
        for key in [*a, *(k for k in b if k not in a)]:
            x, y = a.get(key), b.get(key)
            if x != y:
                told = found.setdefault((key, repr(x), repr(y)), {"what": key, "a": x, "b": y, "arms": []})
                told["arms"].append(arm)
    for told in found.values():
        yield {**told, "arms": "all" if told["arms"] == shared else told["arms"]}


def _trunks(study: Study) -> dict[str, Any]:
    """What trunks change, by dot-keys: of their runs an arm's recipe has nothing but the folder."""
    return {
        f"trunks.{name}.{key}": value
        for name, changes in study.trunks.items()
        for key, value in _flat(changes).items()
    }


def _settings(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Everything that determines a run, by dot-keys; data by what it holds instead of where it lies."""
    plain = _flat(read_stored(folder / "recipe.yaml").model_dump(by_alias=True))
    named = {key for key in plain if key in ("seed", "data.train", "data.validation")}
    data = {f"data.{key} (fingerprint)": value for key, value in result["data"].items()}
    versions = {f"version of {key}": value for key, value in result["versions"].items()}
    return {key: value for key, value in plain.items() if key not in named} | data | versions


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for part, x in value.items() for k, v in _flat(x, f"{key}.{part}".lstrip(".")).items()}
    if isinstance(value, list) and key == "stages":
        return {k: v for i, x in enumerate(value) for k, v in _flat(x, f"stages[{i}]").items()}
    return {key: value}


def _shown(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return f"{len(value)} layers" if "n_heads" in value[0] else f"{len(value)} entries"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _of(difference: Mapping[str, Any]) -> str:
    arms = difference["arms"]
    return "" if arms in (None, "all") else f" (arm {', '.join(arms)})"


def _finished(folder: Path, study: str) -> Runs:
    found: Runs = {}
    for path in sorted((folder / "runs").glob("*/seed-*/result.json")):
        found.setdefault(path.parent.parent.name, []).append((path.parent, results.json_of(path)))
    if not found:
        raise UserError(f"{folder}: study {study} has no finished run")
    return found
