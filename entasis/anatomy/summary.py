"""Summaries of the tidy frame: a table of layers and quantities, rank correlations, the finding in a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from entasis.anatomy.intervals import correlate_ranks, find_harmful
from entasis.anatomy.measures import Measure, load_measures
from entasis.report.tables import Column, Table

HIDDEN = ("cka", "weight_r2_mean", "weight_r2_permuted", "weight_r2_untrained")
"""Not a property of one layer: comparisons of two layers, and controls."""
MAIN = ("skip", "zero_attention", "zero_ffn", "neighbour_average")
"""The reference that measures are correlated with: the first of these that was measured, or else the first ablation."""


def list_quantities(measures: Sequence[Measure]) -> list[str]:
    """What these measures say of single layers."""
    given = [q for m in measures for q in m.gives if m.kind != "loss"]
    return [q for q in given if q not in (*HIDDEN, "replaced") and not q.endswith("_chance")]


def tabulate_layers(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each layer, one column for each quantity; the mean where a layer has several matrices."""
    rows = frame[frame["layer"].notna() & ~frame["quantity"].isin(HIDDEN)]
    wide = rows.pivot_table(index="layer", columns="quantity", values="value", aggfunc="mean", dropna=False)
    order = [q for q in dict.fromkeys(rows["quantity"]) if q in wide]
    return wide[order]


def select_ablations(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The quantities that are changes in loss by layer, with the column `harmful`, in the order measured."""
    result = {}
    for quantity in dict.fromkeys(frame["quantity"]):
        rows = frame[(frame["quantity"] == quantity) & frame["layer"].notna()]
        control = frame.loc[frame["quantity"] == f"{quantity}_chance", "value"]
        if len(rows) and len(control):
            found = find_harmful(rows["value"].to_numpy(), rows["p"].to_numpy(), float(control.iloc[0]))
            result[quantity] = rows.assign(harmful=found)
    return result


def select_manipulations(frame: pd.DataFrame) -> list[str]:
    """The other quantities that are changes in loss by layer, in the order measured."""
    kinds = {name: m.kind for name, m in load_measures().items()}
    return list(dict.fromkeys(frame.loc[frame["measure"].map(kinds) == "manipulation", "quantity"]))


def choose_reference(frame: pd.DataFrame) -> str | None:
    """The ablation that the other measures are compared with; None where none was measured."""
    measured = select_ablations(frame)
    return next((name for name in (*MAIN, *measured) if name in measured), None)


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho of a measure with the reference ablation, over layers."""

    quantity: str
    rho: float
    low: float
    high: float
    layers: int


def correlate_measures(frame: pd.DataFrame) -> list[RankCorrelation]:
    """Every measure's rank correlation with the reference, the largest first; at least four layers in common."""
    main, wide = choose_reference(frame), tabulate_layers(frame)
    if main is None:
        return []
    result = []
    for quantity in wide:
        both = wide[[main, quantity]].dropna() if quantity != main else wide[[]]
        if len(both) >= 4 and quantity != main:
            rho, low, high = correlate_ranks(both[main].to_numpy(), both[quantity].to_numpy())
            if math.isfinite(rho):
                result.append(RankCorrelation(str(quantity), rho, low, high, len(both)))
    return sorted(result, key=lambda a: -abs(a.rho))


def state_finding(frame: pd.DataFrame, documents: int) -> str:
    """The finding of the reference ablation on so many documents, in a sentence or two."""
    main = choose_reference(frame)
    if main is None:
        return "No ablation was measured, so nothing is said about what the model would lose."
    rows = select_ablations(frame)[main]
    if rows["p"].isna().all():
        counted = "1 document is" if documents == 1 else f"{documents} documents are"
        return f"{counted} too few for intervals; nothing was tested."
    value = rows["value"].to_numpy()
    top = rows[(rows["p"] < 0.05) & (value > 0)].sort_values("value", ascending=False).head(3)
    named = ", ".join(f"{layer} ({value:+.3f})" for layer, value in _pairs(top))
    told = f"By {main.replace('_', ' ')}, the layers that matter most are {named} nats per token. "
    if not named:
        told = f"By {main.replace('_', ' ')}, no layer matters with certainty. "
    bad = rows[rows["harmful"]]
    if len(bad):
        listed = ", ".join(f"{layer} ({value:+.4f})" for layer, value in _pairs(bad))
        return told + f"Harmful, beyond chance and after Holm: {listed}."
    below = int((value < 0).sum())
    if below:
        return (
            told + f"No layer is harmful: the loss fell for {below} of {len(value)}, within chance each time."
        )
    rose = "rose for each" if (value > 0).all() else "did not fall for any"
    return told + f"No layer is harmful: the loss {rose} of them."


def _pairs(rows: pd.DataFrame) -> list[tuple[int, float]]:
    return [(int(layer), float(value)) for layer, value in rows[["layer", "value"]].to_numpy()]


def describe_whole(frame: pd.DataFrame) -> list[str]:
    """The values of the whole model, a line for each quantity, with their intervals."""
    rows = frame[frame["layer"].isna()]
    lines: dict[str, list[str]] = {}
    for quantity, target, value, low, high in rows[["quantity", "target", "value", "low", "high"]].to_numpy():
        interval = "" if math.isnan(low) else f" [{low:.4f}, {high:.4f}]"
        of = f"{target}: " if target else ""
        lines.setdefault(quantity, []).append(f"{of}{value:.4f}{interval}")
    return [f"{quantity.replace('_', ' ')} {', '.join(found)}" for quantity, found in lines.items()]


def make_table(frame: pd.DataFrame) -> Table:
    """The layers as rows; changes in loss first, harmful ones marked."""
    wide, found = tabulate_layers(frame), select_ablations(frame)
    first = [*found, *select_manipulations(frame)]
    order = [*first, *(str(q) for q in wide if q not in first)]
    bad = {int(layer) for rows in found.values() for layer in rows.loc[rows["harmful"], "layer"]}
    columns = [
        Column("layer", "layer", "d"),
        *(Column(q, q.replace("_", " "), _form(wide[q], q in first)) for q in order),
    ]
    rows: list[dict[str, Any]] = [
        {
            "layer": int(layer),
            **{str(q): v for q, v in values.items()},
            "harmful": "harmful" if int(layer) in bad else "",
        }
        for layer, values in zip(wide.index, wide[order].to_dict("records"), strict=True)
    ]
    if bad:
        columns.append(Column("harmful", ""))
    return Table(columns, rows)


def fit_width(table: Table, width: int) -> Table:
    """The first columns, as many as fit a terminal; the mark of harmful layers always stays."""
    *columns, last = table.columns
    marked = last.key == "harmful"
    columns = columns if marked else [*columns, last]
    room, kept = width - 2 - (9 if marked else 0), []
    for column in columns:
        shown = [len(column.show(row.get(column.key))) for row in table.rows]
        room -= max([*shown, *map(len, column.heading.split())]) + 3
        if room < 0:
            break
        kept.append(column)
    return Table([*kept, last] if marked else kept, table.rows)


def _form(values: pd.Series, signed: bool) -> str:
    """A format with as many digits as tell the layers apart."""
    largest = float(np.nanmax(np.abs(values.to_numpy(dtype=float)))) if values.notna().any() else 0.0
    if signed:
        return "+.4f"
    if 0 < largest < 0.01 or largest >= 1e5:
        return ".2e"
    return ".3f" if largest < 100 else ",.0f"
