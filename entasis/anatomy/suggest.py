"""Suggestions from the importance of layers: a shape, or a recipe with a training plan.

Both are suggestions to be tried against a plain arm in a study, not findings: that a layer matters in a trained model does
not say that a wider one there trains better.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from entasis import quantities
from entasis.anatomy import summary
from entasis.anatomy.measures import Measure
from entasis.errors import UserError
from entasis.registry import advise
from entasis.shape import fields, specification
from entasis.shape.shapes import ModelShape
from entasis.shape.solve import Solution
from entasis.train import recipe as recipes
from entasis.train.recipe import BatchSize, Data, Recipe

SPREAD = 0.3
SMALLEST_LOSS = 1e-4
"""Nats per token: changes in loss below it are no more apart than noise, and the logarithm needs an end."""


def choose_quantity(measures: Sequence[Measure], wanted: str | None) -> str:
    """What the importance follows: `wanted`, or the main ablation. Raises `UserError` where no measure gives it."""
    given = summary.list_quantities(measures)
    name = wanted or next((q for q in summary.MAIN if q in given), summary.MAIN[0])
    if name not in given:
        raise UserError(f"--importance {name}: not among the measures; {advise(name, given)}")
    return name


def rank_importance(frame: pd.DataFrame, quantity: str, n_layers: int) -> np.ndarray:
    """One number for each layer; a change in loss counts by its logarithm, as it spans decades.

    Raises `UserError` where it was not measured for every layer.
    """
    wide = summary.tabulate_layers(frame).reindex(index=range(n_layers), columns=[quantity])
    values = wide[quantity].to_numpy(dtype=float)
    if np.isnan(values).any():
        missing = int(np.flatnonzero(np.isnan(values))[0])
        raise UserError(f"--importance {quantity}: layer {missing} has no value; choose another measure")
    if quantity in [*summary.select_ablations(frame), *summary.select_manipulations(frame)]:
        values = np.log(np.maximum(values, SMALLEST_LOSS))
    return values


def make_multipliers(values: np.ndarray, spread: float = SPREAD) -> np.ndarray:
    """Linear in the importance, from 1 − spread for the least to 1 + spread for the most (AlphaPruning, 2410.10912)."""
    if not 0 <= spread < 1:
        raise UserError(f"--spread is {spread}; it must be from 0 to below 1")
    width = np.ptp(values)
    if width == 0:
        return np.ones(len(values))
    return 1 - spread + 2 * spread * (values - values.min()) / width


def suggest_profile(
    shape: ModelShape, values: np.ndarray, *, budget: str | int, spread: float = SPREAD, scale: str = "ffn"
) -> tuple[dict[str, Any], Solution]:
    """A recipe's `shape:` with the `scale` ("ffn", "heads" or "both") of each layer by its importance, and its solution.

    The rest stays as it is; the budget is met by widening or narrowing what was scaled, all layers alike. Heads are
    rounded to whole KV groups. Raises `UserError` where the budget cannot be met, or where the layers have different
    numbers of both KV heads and query heads per KV head, or more than heads and widths.
    """
    fields.require(shape.layers, "--suggest profile")
    factors = make_multipliers(values, spread)
    ones = np.ones(shape.n_layers)
    for_ffn, for_heads = (factors if scale in (part, "both") else ones for part in ("ffn", "heads"))
    widths = [layer.d_ff / shape.d_model * f for layer, f in zip(shape.layers, for_ffn, strict=True)]
    heads = [
        layer.n_heads * shape.head_dim / shape.d_model * f
        for layer, f in zip(shape.layers, for_heads, strict=True)
    ]
    kept = {k: v for k, v in shape.to_dict().items() if k != "layers" and v is not None}
    wanted = {
        "profile": "explicit",
        "layers": shape.n_layers,
        **kept,
        "ffn_multipliers": {"values": [round(float(w), 4) for w in widths]},
        "head_multipliers": {"values": [round(float(h), 4) for h in heads]},
        **_kv(shape),
        "scale": scale,
        "budget": budget,
    }
    return wanted, specification.resolve(wanted)


def _kv(shape: ModelShape) -> dict[str, int]:
    attending = [layer for layer in shape.layers if layer.n_heads]
    heads = {layer.n_kv_heads for layer in attending}
    ratios = {layer.n_heads // layer.n_kv_heads for layer in attending}
    if len(ratios) <= 1:
        return {"q_per_kv": ratios.pop()} if ratios else {}
    if len(heads) == 1:
        return {"n_kv_heads": heads.pop()}
    raise UserError("--suggest profile: the layers differ in KV heads and in query heads per KV head")


def suggest_plan(shape: ModelShape, values: np.ndarray, *, tokens: str | int, data: Data) -> str:
    """A recipe as YAML whose training plan trains the most important third of the layers first, then the next, then all.

    A step has about 65,536 tokens, or fewer, so that there are a hundred steps for the plan to share out.
    """
    plan: dict[str, Any] = {"importance": [float(f"{v:.6g}") for v in values]}
    if shape.n_layers < 3:
        plan["groups"] = shape.n_layers
    count = quantities.count(tokens, "--budget")
    rows = max(1, round(min(BatchSize().tokens, count / 100) / data.sequence))
    return recipes.to_yaml(
        Recipe(
            shape=shape.to_dict(),
            data=data,
            batch=BatchSize(tokens=rows * data.sequence),
            tokens=count,
            training_plan={"importance_groups": plan},
        )
    )


def write_importance(quantity: str, values: np.ndarray) -> str:
    """JSON that a training plan's `importance:` reads."""
    return json.dumps({"quantity": quantity, "importance": [float(f"{v:.6g}") for v in values]}) + "\n"
