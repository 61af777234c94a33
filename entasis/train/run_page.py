"""The page of a run, or of several side by side: loss, validation, speed, shapes, samples. Also while they run.

    entasis report runs/tiny

A run is read from its folder alone; its checkpoints are not opened.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entasis import files
from entasis.errors import Damaged, UserError
from entasis.model import weights
from entasis.progress import duration
from entasis.report import charts, silhouettes
from entasis.report.page import Html, Page
from entasis.report.tables import Column, Table
from entasis.shape import cost
from entasis.shape.shapes import ModelShape
from entasis.train import metrics, run_folder
from entasis.train.recipe import to_yaml
from entasis.train.resolved_recipe import SettledRecipe, read_stored

_POINTS = 400
"""Points of a drawn curve, each the mean of its stretch of steps."""


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says: `result` is None while it is not finished."""

    name: str
    recipe: SettledRecipe
    shape: ModelShape
    environment: dict[str, Any]
    rows: list[dict[str, Any]]
    result: dict[str, Any] | None
    doubts: list[str]
    """What is missing from a finished run or was changed after it."""

    @property
    def samples(self) -> list[str]:
        """The texts that the model wrote the last five times, each after its step."""
        found = [row for row in self.rows if row.get("samples")]
        return [f"step {row['step']}: {text}" for row in found[-5:] for text in row["samples"]]

    @property
    def validation(self) -> list[tuple[int, float]]:
        """(tokens, bits per byte) of each validation, that of the finished model last."""
        key = "validation_bits_per_byte"
        found = [(row["tokens"], row[key]) for row in self.rows if key in row]
        told = self.result and self.result["validation"]
        return [*found, (self.rows[-1]["tokens"], told["bits_per_byte"])] if told else found


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run folders that `paths` are, or hold at any depth. Raises `UserError` for a path that holds none."""
    found: dict[Path, None] = {}
    for path in paths:
        inside = (
            [path]
            if (path / "recipe.yaml").is_file()
            else sorted(p.parent for p in path.rglob("recipe.yaml"))
        )
        if not inside:
            raise UserError(f"{path}: no run here; name a run's folder, or one that holds runs")
        found.update(dict.fromkeys(inside))
    return list(found)


def read_run(folder: Path, name: str) -> RunRecord:
    """Reads a run's folder, finished or under way; what is doubtful of a finished one is said on stderr too.

    Raises `UserError` where it has made no step yet, `Damaged`.
    """
    environment, result = folder / run_folder.ENVIRONMENT, folder / run_folder.RESULT
    rows = metrics.records(folder)
    told = files.read_json(result) if result.is_file() else None
    if told is None and not (rows and environment.is_file()):
        raise UserError(f"{folder}: the run has made no step yet")
    if not rows:
        raise Damaged(
            f"damaged: {folder / metrics.METRICS} of a finished run is missing or empty; restore it"
        )
    doubts = run_folder.doubts(folder, told) if told else []
    for line in doubts:
        print(f"note: {line}", file=sys.stderr)
    return RunRecord(
        name,
        read_stored(folder / "recipe.yaml"),
        weights.read_shape(folder),
        files.read_json(environment),
        rows,
        told,
        doubts,
    )


def describe(run: RunRecord) -> dict[str, Any]:
    """The run in one row: state, cost, last loss and score, speed."""
    row = run.rows[-1]
    recent = run.rows[-10:]
    scores = run.validation
    doubtful = run.environment.get("busy", False)
    return {
        "run": run.name,
        "state": "finished" if run.result else _progress(row["step"], run.recipe.total_steps),
        "parameters": cost.parameters(run.shape),
        "tokens": row["tokens"],
        "loss": sum(r["loss"] for r in recent) / len(recent),
        "bits_per_byte": scores[-1][1] if scores else None,
        "tokens_per_second": metrics.steady_median(run.rows, "tokens_per_second"),
        "mfu": None if doubtful else metrics.steady_median(run.rows, "mfu"),
        "memory_bytes": max(r["memory_bytes"] for r in run.rows),
        "seconds": sum(r["seconds"] for r in run.rows),
    }


def _progress(step: int, steps: int) -> str:
    """How far a run is; one whose plan spends FLOPs by what it measures may take more steps than could be known."""
    return f"step {step:,} of {steps:,}" if step <= steps else f"step {step:,}, past the {steps:,} expected"


def write(runs: Sequence[RunRecord], path: Path) -> None:
    """Writes the page of these runs, replacing an earlier one."""
    rows = [describe(run) for run in runs]
    names = [run.name for run in runs]
    page = Page(
        names[0] if len(runs) == 1 else f"{len(runs)} runs", subtitle="training runs, from their own records"
    )
    page.verdict(_sentence(rows))
    page.section("Runs", page.table(_table(rows)), *_notes(page, runs))
    page.section("Loss", page.chart(_curves(runs, names, "loss", "training loss, nats per token")))
    scores = [
        {"tokens": tokens, "score": score, "run": run.name, "place": 1.0}
        for run in runs
        for tokens, score in run.validation
    ]
    if len(scores) > len(runs):
        drawn = _lines(scores, names, "score", "bits per byte on held-out text", dots=True)
        page.section("Validation", page.chart(drawn))
    page.section(
        "On the way",
        page.switch(
            {
                title: _curves(runs, names, key, f"{title}{unit}")
                for key, title, unit in (
                    ("gradient_norm", "gradient norm", ""),
                    ("lr", "learning rate", ""),
                    ("tokens_per_second", "speed", ", tokens per second"),
                )
            }
        ),
    )
    scale = silhouettes.widest([run.shape for run in runs])
    drawings = [
        (
            silhouettes.silhouette(run.shape, scale=scale),
            run.name,
            f"{cost.parameters(run.shape):,} parameters",
        )
        for run in runs
    ]
    page.section("Shapes", page.columns(drawings, silhouettes.KEY))
    if any(run.samples for run in runs):
        page.section("Samples", *(_shown(page, run) for run in runs if run.samples))
    page.section(
        "Recipes",
        *(page.folded(run.name, page.command(to_yaml(run.recipe))) for run in runs),
    )
    page.write(path)


def _sentence(rows: Sequence[dict[str, Any]]) -> str:
    scored = [row for row in rows if row["bits_per_byte"] is not None]
    done = sum(row["state"] == "finished" for row in rows)
    if len(rows) == 1:
        row = rows[0]
        score = f", {row['bits_per_byte']:.4f} bits per byte on held-out text" if scored else ""
        return f"{row['state'].capitalize()}: loss {row['loss']:.4f}{score}."
    told = f"{done} of {len(rows)} runs finished"
    if not scored:
        return f"{told}."
    best = min(scored, key=lambda row: row["bits_per_byte"])
    return f"{told}. The lowest score so far is {best['bits_per_byte']:.4f} bits per byte, of {best['run']}."


def _notes(page: Page, runs: Sequence[RunRecord]) -> list[Html]:
    notes = [line for run in runs for line in run.doubts]
    if len(runs) > 1:
        notes.append(
            "Runs set side by side are no study: nothing here says whether a difference is more than chance."
        )
    if any(run.environment.get("busy") for run in runs):
        notes.append("An MFU is left out where its ceiling was measured while other work took the processor.")
    return [page.note(note) for note in notes]


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = [
        Column("run", "run"),
        Column("state", "state"),
        Column("parameters", "parameters", ",d"),
        Column("tokens", "tokens", ",d"),
        Column("loss", "loss", ".4f", "last 10 steps"),
        Column("bits_per_byte", "bits per byte", ".4f", "held-out"),
        Column("tokens_per_second", "tokens/s", ",.0f"),
        Column("mfu", "MFU", ".1%"),
        Column("memory", "memory", ",.0f", "MB, peak"),
        Column("time", "time"),
    ]
    shown = [{**r, "memory": r["memory_bytes"] / 1e6, "time": duration(r["seconds"])} for r in rows]
    return Table(columns, shown)


def _curves(runs: Sequence[RunRecord], names: Sequence[str], key: str, title: str) -> Any:
    points = []
    for run in runs:
        count = min(_POINTS, len(run.rows))
        for i in range(count):
            part = run.rows[i * len(run.rows) // count : (i + 1) * len(run.rows) // count]
            mean = sum(row[key] for row in part) / len(part)
            points.append(
                {"tokens": part[-1]["tokens"], key: mean, "run": run.name, "place": (i + 1) / count}
            )
    # The first steps of a loss would flatten all the rest.
    return _lines(points, names, key, title, focus=0.05 if key == "loss" else 0.0)


def _lines(rows: Sequence[dict[str, Any]], names: Sequence[str], key: str, title: str, **how: Any) -> Any:
    return charts.lines(
        rows,
        x="tokens",
        x_title="tokens",
        y=key,
        y_title=title,
        series="run",
        repeat="run",
        order=names,
        **how,
    )


def _shown(page: Page, run: RunRecord) -> Html:
    return page.folded(run.name, page.command("\n\n".join(run.samples)))
