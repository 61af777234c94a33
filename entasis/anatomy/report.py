"""`anatomy.json` and `report.html`: everything that was measured, and one page that shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from entasis.anatomy import charts, summary
from entasis.anatomy.measures import Measure
from entasis.anatomy.runner import to_records
from entasis.files import write_text
from entasis.report import silhouettes
from entasis.report.page import Page
from entasis.report.tables import Column, Table
from entasis.shape.shapes import ModelShape


def write(
    frame: pd.DataFrame,
    shape: ModelShape,
    measures: Sequence[Measure],
    facts: Mapping[str, Any],
    folder: Path,
    *,
    name: str,
) -> Path:
    """Writes both files into `folder`; the page's path. `facts` are what the figures depend on."""
    says = {quantity: text for m in measures for quantity, text in m.gives.items()}
    page = Page(f"Anatomy of {name}", subtitle=_subtitle(facts))
    sentence = summary.state_finding(frame, facts["documents"])
    page.verdict(sentence)
    page.section("The layers", *_overview(page, frame, shape, says))
    if ablations := summary.select_ablations(frame):
        page.section("What the model loses without a layer", *_ablations(page, ablations, frame, says))
    if other := summary.select_manipulations(frame):
        parts = {q: frame[frame["quantity"] == q] for q in other}
        page.section(
            "What a change of a layer's weights costs",
            page.chart(charts.draw_curves(parts, "change in loss, nats per token")),
            page.folded("What was done", page.facts({q: says[q] for q in other})),
        )
    if found := summary.correlate_measures(frame):
        page.section("Which measures can be trusted", *_correlations(page, found, frame))
    _weights(page, frame, says)
    _streams(page, frame)
    if len(recovery := frame[frame["quantity"] == "recovery_steps"]):
        page.section(
            "How soon a layer recovers",
            page.chart(charts.draw_curves({"recovery_steps": recovery}, "steps", decades=False)),
            page.note(says["recovery_steps"] + "."),
        )
    table = summary.make_table(frame)
    page.section(
        "All values",
        *([page.folded("By layer", page.table(table))] if table.rows else []),
        page.folded(
            "What the quantities are",
            page.facts({q: t for q, t in says.items() if q in set(frame["quantity"])}),
        ),
        page.facts(facts),
    )
    page.write(folder / "report.html")
    # Last: anatomy.json means that the report beside it is whole.
    answer = {
        "name": name,
        **facts,
        "sentence": sentence,
        "quantities": says,
        "values": to_records(frame),
    }
    write_text(folder / "anatomy.json", json.dumps(answer, allow_nan=False) + "\n")
    return folder / "report.html"


def _subtitle(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['layers']} layers · {facts['tokens']:,} tokens of {facts['documents']:,} documents, "
        f"{facts['sequence']} at a time"
    )


def _overview(page: Page, frame: pd.DataFrame, shape: ModelShape, says: dict[str, str]) -> list[str]:
    text = "; ".join(summary.describe_whole(frame[frame["measure"] == "loss"]))
    drawn = [
        (silhouettes.silhouette(shape), "the model", f"{shape.n_layers} layers, d_model {shape.d_model}")
    ]
    blocks: list[str] = [page.columns(drawn, silhouettes.KEY), page.note(f"The whole model: {text}.")]
    wide = summary.tabulate_layers(frame)
    if len(wide.columns):
        blocks += [
            page.chart(charts.draw_heat_map(wide, says)),
            page.note(
                "Colour is the rank of a layer within its row: yellow the largest, violet the smallest. Values are "
                "shown on hover; where a layer has several matrices, their mean."
            ),
        ]
    return blocks


def _ablations(
    page: Page, found: dict[str, pd.DataFrame], frame: pd.DataFrame, says: dict[str, str]
) -> list[str]:
    rows = []
    for name, part in found.items():
        control = float(frame.loc[frame["quantity"] == f"{name}_chance", "value"].iloc[0])
        bad = [str(int(layer)) for layer in part.loc[part["harmful"], "layer"]]
        tested = part["p"].notna().any()
        rows.append(
            {
                "ablation": name.replace("_", " "),
                "smallest": part["value"].min(),
                "median": part["value"].median(),
                "largest": part["value"].max(),
                "chance": control,
                "sure": int((part["p"] < 0.05).sum()) if tested else None,
                "harmful": ", ".join(bad) or ("none" if tested else None),
            }
        )
    columns = [
        Column("ablation", "ablation"),
        Column("smallest", "smallest", "+.4f", "nats/token"),
        Column("median", "median", "+.4f", "nats/token"),
        Column("largest", "largest", "+.4f", "nats/token"),
        Column("chance", "chance", ".4f", "nats/token"),
        Column("sure", "p < 0.05", "d", "layers"),
        Column("harmful", "harmful layers"),
    ]
    return [
        page.chart(charts.draw_curves(found, "change in loss, nats per token")),
        page.note(
            "Bars: 95 % intervals, paired over documents (bootstrap-t), one layer at a time. The axis is logarithmic "
            "away from zero. Click a name to bring it forward."
        ),
        page.table(Table(columns, rows)),
        page.note(
            "p is adjusted by Holm over the layers of an ablation. Chance is what a layer of an untrained model of "
            "this shape shows with probability 0.05 (all layers together): of two random functions one is better. "
            "A layer is harmful only if p < 0.05 and the gain without it exceeds chance."
        ),
        page.folded("What was done", page.facts({q: says[q] for q in found})),
    ]


def _correlations(page: Page, found: list[summary.RankCorrelation], frame: pd.DataFrame) -> list[str]:
    main = summary.choose_reference(frame)
    assert main is not None
    return [
        page.chart(charts.draw_correlations(found, main)),
        page.note(
            f"Spearman's rank correlation over layers of each measure with the measured loss of {main.replace('_', ' ')}; "
            "bars are 95 % intervals (bootstrap over layers). A cheap measure far from zero, with an interval that is "
            "too, can stand in for the ablation; one near zero cannot."
        ),
    ]


def _weights(page: Page, frame: pd.DataFrame, says: dict[str, str]) -> None:
    blocks: list[str] = []
    kinds = ["weight_r2", "weight_r2_mean", "weight_r2_permuted", "weight_r2_untrained", "delta_deviation"]
    rows = frame[frame["quantity"].isin(kinds)]
    if len(rows):
        wide = rows.pivot_table(
            index="target", columns="quantity", values="value", aggfunc="mean", sort=False
        )
        present = [k for k in kinds if k in wide]
        columns = [Column("target", "matrix"), *(Column(k, k.replace("_", " "), "+.4f") for k in present)]
        body: list[dict[str, Any]] = [
            {"target": t, **{str(q): x for q, x in v.items()}}
            for t, v in zip(wide.index, wide.to_dict("records"), strict=True)
        ]
        blocks += [
            page.table(Table(columns, body)),
            page.note("Means over layers."),
            page.facts({k: says[k] for k in present}),
        ]
    replaced = frame[frame["quantity"] == "replaced"]
    if len(replaced):
        columns = [
            Column("target", "layers replaced by their prediction"),
            *(
                Column(k, h, "+.4f", "nats/token")
                for k, h in (("value", "change in loss"), ("low", "from"), ("high", "to"))
            ),
        ]
        blocks.append(page.table(Table(columns, to_records(replaced))))
    if blocks:
        page.section("How well other layers predict a layer's weights", *blocks)


def _streams(page: Page, frame: pd.DataFrame) -> None:
    shown = {}
    if len(cka := frame[frame["quantity"] == "cka"]):
        shown["CKA"] = charts.draw_cka(cka)
    if len(lens := frame[frame["quantity"] == "logit_lens"]):
        shown["logit lens"] = charts.draw_curves(
            {"logit_lens": lens}, "loss stopped behind the layer, nats per token", decades=False
        )
    if shown:
        page.section("The residual stream", page.switch(shown))
