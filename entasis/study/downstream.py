"""Downstream scores of a study's runs: lm-eval tasks after training (the extra `eval`).

downstream: {tasks: [next_line], include_path: tasks/}

They stand beside bits per byte and do not decide the verdict: at the sizes of a study most tasks are at chance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from entasis.files import write_text
from entasis.report.tables import Column, Table
from entasis.study import results, statistics
from entasis.study.config import Downstream
from entasis.study.results import Outcome

FILE = "downstream.json"


def score(wanted: Downstream, done: Sequence[Outcome], console: Console) -> None:
    """Writes `downstream.json` into the folder of every run that has none: task → metric → value."""
    left = [o for o in done if not (o.folder / FILE).is_file()]
    if not left:
        return
    from entasis.evaluate import harness
    from entasis.evaluate.loading import load

    for i, outcome in enumerate(left, 1):
        console.print(f"downstream {i} of {len(left)}: {outcome.run.folder}", markup=False, highlight=False)
        answer = harness.run(
            load(outcome.folder), wanted.tasks, include_path=wanted.include_path, limit=wanted.limit
        )
        plain = {
            task: {
                name.removesuffix(",none"): float(value)
                for name, value in values.items()
                if isinstance(value, float) and "stderr" not in name
            }
            for task, values in answer["results"].items()
        }
        write_text(outcome.folder / FILE, json.dumps(plain, indent=1) + "\n")


def table(grid: dict[str, list[Any]], done: dict[str, Outcome], baseline: str) -> Table:
    """One row a task, metric and arm: mean over seeds, paired difference to the baseline, its 95 % interval."""
    found = {
        arm: {run.seed: results.json_of(done[run.folder].folder / FILE) for run in runs if _there(done, run)}
        for arm, runs in grid.items()
    }
    measured = sorted({(t, m) for seeds in found.values() for r in seeds.values() for t in r for m in r[t]})
    rows = []
    for task, metric in measured:
        values = {arm: {s: r[task][metric] for s, r in seeds.items()} for arm, seeds in found.items()}
        for arm, scores in values.items():
            if not scores:
                continue
            row: dict[str, Any] = {"task": task, "metric": metric, "arm": arm}
            row["mean"] = float(np.mean(list(scores.values())))
            pairs = [scores[s] - values[baseline][s] for s in scores if s in values[baseline]]
            if arm != baseline and pairs:
                mean, low, high, _ = statistics.paired_interval(pairs)
                row |= {"difference": mean, "low": low, "high": high}
            rows.append(row)
    return Table(
        [
            Column("task", "task"),
            Column("metric", "metric"),
            Column("arm", "arm"),
            Column("mean", "score", ".4f", "mean of seeds"),
            Column("difference", "difference", "+.4f", f"to {baseline}"),
            Column("low", "95 % from", "+.4f", "paired by seed"),
            Column("high", "to", "+.4f"),
        ],
        rows,
    )


def _there(done: dict[str, Outcome], run: Any) -> bool:
    return run.folder in done and (done[run.folder].folder / FILE).is_file()
