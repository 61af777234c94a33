"""The charts of the anatomy report: heat map, curves over depth, rank correlations, CKA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from scipy import stats

from entasis.anatomy.summary import RankCorrelation
from entasis.report import charts
from entasis.report.charts import PALETTE

Chart = alt.LayerChart
LINEAR = 0.01
"""Nats per token, up to which the axis of changes in loss is about linear."""


def draw_heat_map(wide: pd.DataFrame, says: dict[str, str]) -> Chart:
    """Layers from left to right, measures from top to bottom; colour is the layer's rank within a measure."""
    rows: list[dict[str, Any]] = []
    for quantity in wide:
        values = wide[quantity].to_numpy(dtype=float)
        known = ~np.isnan(values)
        ranks = np.full(len(values), np.nan)
        ranks[known] = (stats.rankdata(values[known]) - 1) / max(1, known.sum() - 1)
        rows += [
            {
                "measure": str(quantity).replace("_", " "),
                "layer": int(layer),
                "value": float(f"{v:.5g}"),
                "rank": round(float(r), 3),
                "says": says.get(str(quantity), ""),
            }
            for layer, v, r in zip(wide.index, values, ranks, strict=True)
            if np.isfinite(v)
        ]
    base = alt.Chart(alt.InlineData(rows)).mark_rect(stroke=None)
    chart = base.encode(
        x=_layers(wide.index),
        y=_measures([str(q).replace("_", " ") for q in wide]),
        color=alt.Color(
            "rank:Q",
            scale=alt.Scale(scheme="viridis", domain=[0, 1]),
            legend=alt.Legend(title="rank among the layers", orient="top", format=".0%", gradientLength=160),
        ),
        tooltip=[
            alt.Tooltip("measure:N"),
            alt.Tooltip("layer:Q"),
            alt.Tooltip("value:Q", format=".4~g"),
            alt.Tooltip("says:N", title=" "),
        ],
    )
    return _finish(alt.layer(chart), height=alt.Step(19))


def draw_curves(parts: dict[str, pd.DataFrame], title: str, *, decades: bool = True) -> Chart:
    """Values over depth with their intervals.

    With `decades` the axis is logarithmic away from zero, as changes in loss span decades; otherwise it is linear.
    """
    rows: list[dict[str, Any]] = [
        {
            "measure": name.replace("_", " "),
            "layer": int(r["layer"]),
            **{k: round(float(r[k]), 6) for k in ("value", "low", "high") if np.isfinite(r[k])},
        }
        for name, part in parts.items()
        for r in part.to_dict("records")
    ]
    order = [name.replace("_", " ") for name in parts]
    chosen, forward = charts.choice("measure")
    base = alt.Chart(alt.InlineData(rows)).encode(
        x=_layers(sorted({r["layer"] for r in rows})),
        y=_decades(rows, title) if decades else alt.Y("value:Q", title=title, axis=alt.Axis(format="~g")),
        color=alt.Color(
            "measure:N",
            sort=order,
            scale=alt.Scale(domain=order, range=[PALETTE[i % len(PALETTE)] for i in range(len(order))]),
            title=None,
            legend=charts.saved_legend(),
        ),
        opacity=alt.condition(forward, alt.value(0.9), alt.value(0.08)),
        tooltip=[
            "measure:N",
            "layer:Q",
            *(alt.Tooltip(f"{k}:Q", format="+.4f") for k in ("value", "low", "high")),
        ],
    )
    zero = _zero_line().encode(y="zero:Q")
    bars = (
        base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.4).encode(y="low:Q", y2="high:Q")
    )
    line = base.mark_line(strokeWidth=1.2)
    dots = base.mark_point(filled=True, size=42)
    chart = alt.layer(zero, line, bars, dots).add_params(chosen)
    return _finish(chart.properties(usermeta=charts.legend(order)), height=340)


def draw_correlations(found: Sequence[RankCorrelation], main: str) -> Chart:
    """Rank correlations with the measured loss, with intervals over layers."""
    rows: list[dict[str, Any]] = [
        {
            "measure": a.quantity.replace("_", " "),
            "rho": round(a.rho, 4),
            "low": round(a.low, 4),
            "high": round(a.high, 4),
            "layers": a.layers,
        }
        for a in found
    ]
    base = alt.Chart(alt.InlineData(rows)).encode(
        y=_measures([r["measure"] for r in rows]),
        tooltip=[
            "measure:N",
            *(alt.Tooltip(f"{k}:Q", format="+.2f") for k in ("rho", "low", "high")),
            "layers:Q",
        ],
    )
    zero = _zero_line().encode(x="zero:Q")
    axis = alt.X(
        "rho:Q",
        title=f"rank correlation with {main.replace('_', ' ')}",
        scale=alt.Scale(domain=[-1, 1]),
        axis=alt.Axis(format="+.1f", tickCount=5),
    )
    bars = base.mark_rule(strokeWidth=3, strokeCap="round", color=PALETTE[0]).encode(x="low:Q", x2="high:Q")
    dots = base.mark_point(filled=True, size=80, opacity=1, color=PALETTE[0]).encode(x=axis)
    return _finish(alt.layer(zero, bars, dots), height=alt.Step(21))


def draw_cka(rows: pd.DataFrame) -> Chart:
    """Similarity (CKA) of the residual stream behind every two layers."""
    data = [
        {"layer": int(r["layer"]), "other": int(r["target"]), "cka": round(float(r["value"]), 4)}
        for r in rows.to_dict("records")
        if np.isfinite(r["value"])
    ]
    n = sorted({r["layer"] for r in data})
    chart = (
        alt.Chart(alt.InlineData(data))
        .mark_rect()
        .encode(
            x=_layers(n),
            y=alt.Y("other:O", title="layer", sort="descending", axis=alt.Axis(labelOverlap=True)),
            color=alt.Color(
                "cka:Q",
                scale=alt.Scale(scheme="viridis"),
                legend=alt.Legend(title="CKA", orient="top", gradientLength=160),
            ),
            tooltip=["layer:Q", "other:Q", alt.Tooltip("cka:Q", format=".3f")],
        )
    )
    return _finish(alt.layer(chart), height=360)


def _decades(rows: Sequence[dict[str, Any]], title: str) -> alt.Y:
    """An axis with a line at 0 and at every power of ten that has room.

    Left to itself Vega sets lines at equal steps, none of them where the curve is stretched most.
    """
    drawn = [row[k] for row in rows for k in ("value", "low", "high") if k in row]
    low, high = min(0.0, *drawn), max(0.0, *drawn)
    room = (_stretched(high) - _stretched(low)) / 20
    ticks = [0.0]
    for sign in (1, -1):
        last = 0.0
        for power in range(-3, 10):
            value = sign * 10.0**power
            if low <= value <= high and abs(_stretched(value) - _stretched(last)) > room:
                ticks.append(last := value)
    # Where all is smaller the axis is near enough to linear, and equal steps say more.
    spans = max(-low, high) >= 10 * LINEAR
    axis = alt.Axis(format="~g", values=ticks) if spans else alt.Axis(format="~g")
    # Vega rounds the axis's ends by equal steps too, which would give half of it to what lies below zero.
    scale = alt.Scale(type="symlog", constant=LINEAR, nice=False, padding=8)
    return alt.Y("value:Q", title=title, scale=scale, axis=axis)


def _stretched(value: float) -> float:
    return math.copysign(math.log1p(abs(value) / LINEAR), value)


def _layers(index: Sequence[Any] | pd.Index) -> alt.X:
    return alt.X(
        "layer:O", sort=[int(i) for i in index], title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)
    )


def _measures(order: list[str]) -> alt.Y:
    axis = alt.Axis(labelLimit=190, domain=False, ticks=False)
    return alt.Y("measure:N", sort=order, title=None, axis=axis)


def _zero_line() -> alt.Chart:
    return alt.Chart(alt.InlineData([{"zero": 0}])).mark_rule(strokeDash=[4, 3])


def _finish(chart: Any, *, height: Any) -> Chart:
    return chart.properties(width="container", height=height).configure(
        autosize={"type": "fit-x", "contains": "padding"},
        axis={"labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": 500, "titlePadding": 9},
        view={"stroke": None},
    )
