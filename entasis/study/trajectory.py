"""What was known after every look: the confidence sequences of a study that adds seeds, as a chart and a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from entasis.report import charts
from entasis.report.page import Page
from entasis.report.tables import Column, Table
from entasis.study.config import Study
from entasis.study.verdict import Verdict, plain


def rows(verdict: Verdict, protocol: str) -> list[dict[str, Any]]:
    """Every look of every arm, and of every contrast as `a − b`."""
    part = verdict.protocols[protocol]
    looks = {name: arm.looks for name, arm in part.arms.items()}
    looks |= {_label(c.arm, c.against): c.looks for c in part.contrasts}
    return [{"arm": name, **plain(look)} for name, of in looks.items() for look in of or []]


def _label(arm: str, against: str) -> str:
    return f"{arm} − {against}"


def table(verdict: Verdict, protocol: str) -> Table:
    """What was known of each arm and contrast after so many seeds."""
    return Table(
        [
            Column("arm", "arm"),
            Column("n", "seeds", "d"),
            Column("mean", "difference", "+.4f"),
            Column("low", "95 % from", "+.4f", "this arm alone"),
            Column("high", "to", "+.4f"),
            Column("p", "p", ".3g", "whenever one stops"),
            Column("together_low", "95 % from", "+.4f", "all comparisons"),
            Column("together_high", "to", "+.4f"),
        ],
        rows(verdict, protocol),
    )


def chart(page: Page, study: Study, verdict: Verdict, protocol: str, folder: Path) -> list[str]:
    """The sequences over seeds; nothing where no look has an interval."""
    assert study.until is not None
    points = [
        {"arm": row["arm"], "line": line, "n": row["n"], "value": row[key]}
        for row in rows(verdict, protocol)
        for line, key in (("mean", "mean"), ("from", "together_low"), ("to", "together_high"))
        if row["together_low"] is not None
    ]
    if not points:
        return []
    drawn = charts.lines(
        points,
        x="n",
        x_title="seeds",
        y="value",
        y_title=f"difference to {study.baseline}{' (a − b: to b)' if study.contrasts else ''}, bits per byte",
        series="arm",
        repeat="line",
        order=[*study.arms, *(_label(*both) for both in study.contrasted)],
        zero=True,
        x_format="d",
    )
    charts.save(drawn, folder / "charts" / f"trajectory-{protocol}")
    asked = "" if study.until.detectable is None else f"a half width of {study.until.detectable:g}, or "
    said = (
        "Mean difference after every look, and the 95 % confidence sequence of all comparisons together: it holds at all "
        f"looks at once. An arm gets no further seeds after {asked}a difference or sameness within ±{study.margin:g} is "
        f"shown; none gets more than {study.until.seeds}."
    )
    return [page.chart(drawn), page.note(said)]
