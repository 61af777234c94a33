"""The charts: one Altair definition each, shown interactive in a page and saved as SVG and PDF.

    charts.forest(rows, unit="bits per byte")         differences with intervals
    charts.lines(rows, x=…, y=…, series=…, repeat=…)  curves, every repeat visible
    charts.slopes(rows, …)                            one dot a run, runs of one seed joined

Rows are lists of plain dictionaries. Colours tell apart on light and dark and for most colour-blind readers
(Okabe and Ito 2008, the yellow darkened, black left out).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair

PALETTE = [
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8c6bb1",
    "#b8a600",
    "#7f7f7f",
    "#a6761d",
]
Rows = Sequence[dict[str, Any]]
_HOVERED = "hovered"
"""The layer of a chart that only a pointer brings out."""


def forest(rows: Rows, *, title: str, order: Sequence[str], margin: float | None = None) -> altair.LayerChart:
    """Differences to the baseline with intervals, zero marked, ±margin shaded; lower is better.

    `order` names all arms, the baseline too, so that an arm has the same colour in every chart.

    Each row: `arm`, `mean`, `low`, `high` (the interval; None without), `total_low`, `total_high` (with evaluation
    error; drawn thin), `values` (single differences, drawn as ticks) and `says` (shown on hover).
    """
    alt = _altair()
    flat = [{k: v for k, v in row.items() if k != "values"} for row in rows]
    single = [{"arm": r["arm"], "value": v, "seed": s} for r in rows for s, v in r["values"].items()]
    y = alt.Y(
        "arm:N",
        sort=[row["arm"] for row in rows],
        title=None,
        axis=alt.Axis(labelFontSize=13, labelLimit=220, domain=False),
    )
    axis = alt.Axis(tickCount=7, labelExpr="datum.value == 0 ? '0' : format(datum.value, '+.3~f')")
    x = alt.X("low:Q", title=f"← better\u2003\u2003{title}\u2003\u2003worse →", axis=axis)
    tooltip = [
        alt.Tooltip("arm:N"),
        alt.Tooltip("mean:Q", format="+.4f", title="difference"),
        alt.Tooltip("low:Q", format="+.4f", title="95 % from"),
        alt.Tooltip("high:Q", format="+.4f", title="95 % to"),
        alt.Tooltip("says:N", title=" "),
    ]
    source = alt.InlineData(flat)
    layers: list[Any] = []
    if margin:
        band = alt.Chart(alt.InlineData([{"from": -margin, "to": margin}]))
        layers.append(band.mark_rect(opacity=0.13, color="#808080").encode(x="from:Q", x2="to:Q"))
    layers.append(alt.Chart(alt.InlineData([{"zero": 0}])).mark_rule(strokeDash=[4, 3]).encode(x="zero:Q"))
    base = alt.Chart(source)
    colour = alt.Color("arm:N", sort=list(order), scale=_scale(order), legend=None)
    layers += [
        base.mark_rule(strokeWidth=1, opacity=0.7).encode(
            x="total_low:Q", x2="total_high:Q", y=y, color=colour, tooltip=tooltip
        ),
        base.mark_rule(strokeWidth=4, strokeCap="round").encode(
            x=x, x2="high:Q", y=y, color=colour, tooltip=tooltip
        ),
        alt.Chart(alt.InlineData(single))
        .mark_tick(thickness=1.5, height=13, opacity=0.75, style="ink")
        .encode(x="value:Q", y=y, tooltip=["arm:N", "seed:N", alt.Tooltip("value:Q", format="+.4f")]),
        base.mark_point(filled=True, size=110, opacity=1).encode(
            x="mean:Q", y=y, color=colour, tooltip=tooltip
        ),
    ]
    return _finish(alt.layer(*layers), height=alt.Step(38))


def lines(
    rows: Rows,
    *,
    x: str,
    x_title: str,
    y: str,
    y_title: str,
    series: str,
    repeat: str,
    order: Sequence[str],
    zero: bool = False,
    log_x: bool = False,
    x_format: str = "~s",
    top: float | None = None,
    focus: float = 0.0,
    dots: bool = False,
) -> altair.LayerChart:
    """Curves of several repeats of several series; the legend's names bring one forward on a click.

    `top` cuts the y axis where the first steps would flatten everything else; `focus` sets it by the rows whose
    `place` (share of the run, 0 to 1) is above it. `dots` marks every row, for curves of few.
    """
    alt = _altair()
    values = [row[y] for row in rows if not focus or row["place"] > focus]
    bottom, ceiling = min(values), max(values) if top is None else min(top, max(values))
    domain = [min(bottom, 0.0), max(ceiling, 0.0)] if zero else [bottom, ceiling]
    chosen, forward = choice(series)
    near = alt.selection_point(
        on="pointerover", nearest=True, fields=[x], empty=False, clear="pointerout", name="near"
    )
    base = alt.Chart(alt.InlineData(list(rows))).encode(
        x=alt.X(
            f"{x}:Q",
            title=x_title,
            scale=alt.Scale(type="log" if log_x else "linear", nice=False),
            axis=alt.Axis(format=x_format, grid=False, tickCount=6),
        ),
        y=alt.Y(f"{y}:Q", title=y_title, scale=alt.Scale(domain=domain, nice=True, clamp=False)),
        color=alt.Color(
            f"{series}:N", sort=list(order), scale=_scale(order), title=None, legend=saved_legend()
        ),
        detail=f"{repeat}:N",
        opacity=alt.condition(forward, alt.value(0.85), alt.value(0.08)),
        tooltip=[
            alt.Tooltip(f"{series}:N"),
            alt.Tooltip(f"{repeat}:N"),
            alt.Tooltip(f"{x}:Q", title=x_title, format=".4~s"),
            alt.Tooltip(f"{y}:Q", title=y_title, format=".4f"),
        ],
    )
    drawn = [base.mark_line(strokeWidth=1.4, clip=True, interpolate="linear")]
    if zero:
        drawn.insert(
            0, alt.Chart(alt.InlineData([{"zero": 0}])).mark_rule(strokeDash=[4, 3]).encode(y="zero:Q")
        )
    points = base.mark_point(filled=True, size=55, clip=True).encode(
        opacity=alt.condition(near, alt.value(1), alt.value(0.85 if dots else 0))
    )
    hovered = points.add_params(near) if dots else points.properties(name=_HOVERED).add_params(near)
    chart = alt.layer(*drawn, hovered).add_params(chosen)
    return _finish(chart.properties(usermeta=legend(order)), height=330)


def slopes(
    rows: Rows, *, y: str, y_title: str, series: str, repeat: str, order: Sequence[str]
) -> altair.LayerChart:
    """Every run as a dot, the runs of one repeat joined: what pairing buys is seen at once."""
    alt = _altair()
    base = alt.Chart(alt.InlineData(list(rows))).encode(
        x=alt.X(f"{series}:N", sort=list(order), title=None, axis=_names(order)),
        y=alt.Y(f"{y}:Q", title=y_title, scale=alt.Scale(zero=False, padding=12)),
        tooltip=[f"{series}:N", f"{repeat}:N", alt.Tooltip(f"{y}:Q", format=".4f", title=y_title)],
    )
    joined = base.mark_line(strokeWidth=1, opacity=0.45, color="#888888").encode(
        detail=f"{repeat}:N", order=alt.Order("place:Q")
    )
    dots = base.mark_point(filled=True, size=75, opacity=0.95).encode(
        color=alt.Color(f"{series}:N", sort=list(order), scale=_scale(order), legend=None)
    )
    return _finish(alt.layer(joined, dots), height=260)


def save(chart: altair.TopLevelMixin, stem: Path) -> None:
    """Writes `stem.svg` and `stem.pdf`, 640 px wide, on white, without the marks that only a pointer brings out."""
    import altair
    import vl_convert

    from entasis.files import write_bytes, write_text

    spec = chart.to_dict()
    spec["width"] = 640
    spec["background"] = "white"
    if "layer" in spec:
        spec["layer"] = [layer for layer in spec["layer"] if layer.get("name") != _HOVERED]
        spec["params"] = [p for p in spec.get("params", []) if _HOVERED not in p.get("views", [])]
    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    svg = vl_convert.vegalite_to_svg(spec, vl_version=version)
    write_text(stem.with_suffix(".svg"), svg)
    write_bytes(stem.with_suffix(".pdf"), vl_convert.svg_to_pdf(svg))


def _altair() -> Any:
    """Altair, told to hoist every data set to the top of the chart, where pages share them."""
    import altair

    altair.data_transformers.disable_max_rows()
    return altair


def _scale(order: Sequence[str]) -> altair.Scale:
    import altair

    return altair.Scale(domain=list(order), range=[PALETTE[i % len(PALETTE)] for i in range(len(order))])


def choice(series: str) -> tuple[Any, str]:
    """The parameter `chosen`, a list that the page's legend sets, and what holds for a row that it brings forward."""
    test = f"length(chosen) == 0 || indexof(chosen, datum[{series!r}]) >= 0"
    return _altair().param(name="chosen", value=[]), test


def legend(order: Sequence[str]) -> dict[str, Any]:
    """Names and colours as the page shows them: buttons that wrap, and that a keyboard reaches."""
    return {"legend": [[name, PALETTE[i % len(PALETTE)]] for i, name in enumerate(order)]}


def saved_legend() -> Any:
    """The legend of a chart that is saved as a picture; a page shows `legend` in its place."""
    return _altair().Legend(
        orient="top", columns=4, symbolType="stroke", symbolStrokeWidth=4, symbolSize=180, labelFontSize=13
    )


def _names(order: Sequence[str]) -> Any:
    """An axis of names: slanted where they would run into each other."""
    slanted = sum(map(len, order)) > 50
    return _altair().Axis(
        labelAngle=-40 if slanted else 0, labelLimit=160 if slanted else 110, labelOverlap=False
    )


def _finish(chart: altair.LayerChart, *, height: Any) -> altair.LayerChart:
    return chart.properties(width="container", height=height).configure(
        autosize={"type": "fit-x", "contains": "padding"},
        axis={"labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": 500, "titlePadding": 9},
        view={"stroke": None},
    )
