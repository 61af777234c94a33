"""What growth operators found out on the way, as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def show(operator: str, found: Mapping[str, Any], console: Console) -> None:
    """Prints an operator's diagnostics: predictions and alignments as tables, the rest as JSON, warnings not."""
    if "matrices" in found:
        _show_predictions(operator, found, console)
    if "alignment" in found:
        _show_alignment(operator, found["alignment"], console)
    known = ("matrices", "held_out_layers", "alignment", "warnings")
    if rest := {name: value for name, value in found.items() if name not in known}:
        console.print(f"{operator}: {json.dumps(rest)}")


def _show_predictions(operator: str, found: Mapping[str, Any], console: Console) -> None:
    from rich.table import Table

    layers = ", ".join(map(str, found["held_out_layers"]))
    columns = ("matrix", "cosine", "(mean)", "length", "(mean)", "rank", "(mean)", "(true)", "new: length")
    table = Table(*columns, box=None)
    for name, one in found["matrices"].items():
        ours, mean = one["predicted"], one["average"]
        table.add_row(
            name,
            *(f"{x['cosine']:.3f}" for x in (ours, mean)),
            *(f"{x['norm_ratio']:.2f}" for x in (ours, mean)),
            *(f"{x['effective_rank']:.0f}" for x in (ours, mean)),
            f"{one['true_effective_rank']:.0f}",
            f"{one['inserted_norm_ratio']:.2f}",
        )
    console.print(
        f"{operator}: held-out layers {layers} as predicted, beside (the mean of their neighbours); rank is the effective rank"
    )
    console.print(table)
    if dropped := sum(one["dropped"] for one in found["matrices"].values()):
        console.print(f"{dropped} components of the shared bases were dropped as too small")


def _show_alignment(operator: str, pairs: list[dict[str, Any]], console: Console) -> None:
    for part, name in (("heads", "attention heads"), ("units", "FFN units")):
        found = [one[part] for one in pairs if part in one]
        if found:
            before, matched, control = (
                f"{sum(one[key] for one in found) / len(found):.3f}"
                for key in ("before", "cosine", "control")
            )
            console.print(
                f"{operator}: mean cosine of {name} of neighbours {before} as they stand, {matched} matched; matched to a "
                f"randomly rotated one {control}"
            )
