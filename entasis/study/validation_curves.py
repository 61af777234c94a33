"""The held-out text as training goes: what the runs scored in the middle (`evaluation.every`), every seed of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entasis.report import charts
from entasis.report.page import Page
from entasis.study.results import Outcome


def section(page: Page, done: Sequence[Outcome], order: Sequence[str], folder: Path) -> list[str]:
    """The chart as a file and a block of the page; nothing where no run was validated before its end."""
    rows = [row for o in done for row in points_of(o)]
    if len(rows) == len(done):
        return []
    chart = charts.lines(
        rows, x="tokens", x_title="tokens", y="score", y_title="validation bits per byte",
        series="arm", repeat="seed", order=order, dots=True,
    )  # fmt: skip
    charts.save(chart, folder / "charts" / "validation-tokens")
    return [
        page.chart(chart),
        page.note(
            "Each point is one validation of one run, the last one its score; points of a seed are joined. Scores in the "
            "middle are at whatever learning rate the schedule has there, and no part of the verdict."
        ),
    ]


def points_of(o: Outcome) -> list[dict[str, Any]]:
    """Tokens and score of every validation of a run, the last one with its result."""
    scores = [
        (m["tokens"], m["validation_bits_per_byte"])
        for m in o.metrics()
        if "validation_bits_per_byte" in m and m["tokens"] < o.result["tokens"]
    ]
    scores.append((o.result["tokens"], o.bits_per_byte))
    return [
        {"arm": o.label, "seed": f"seed {o.run.seed}", "tokens": n, "score": round(float(score), 5)}
        for n, score in scores
    ]
