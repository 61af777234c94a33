"""What each parameter is, and how its learning rate, decay and initial size follow from its own fan-in.

Standard parametrisation leaves every factor at 1. Under muP, with `m = fan_in / base fan_in` of each matrix:

| parameter                  | init std | lr, AdamW | lr, Muon | weight decay |
|----------------------------|----------|-----------|----------|--------------|
| hidden matrix              | σ / √m   | 1 / m     | u        | 1 / lr       |
| untied head                | σ        | 1         | –        | 1            |
| embedding, position table  | σ        | 1         | –        | 1            |
| vector (norm, bias)        | –        | 1         | –        | 1            |

AdamW's column is Table 8 of 2203.03466. Muon's update has a spectral norm of √max(fan_out, fan_in) and should have one
of √(fan_out / fan_in) (2310.17813, condition 1), so u is the one over the other, relative to the base's matrix; for
square matrices 1 / √m.

The base's matrix is that of a model of width `base_width` whose every layer is the mean of this model's layers: axes of
the residual stream are `base_width` long, axes inside a layer `base_width` × the mean of their lengths over the layers /
d_model. So a layer twice as wide as the mean gets half of the mean layer's learning rate on `down`.

The head's share of muP is the shape's `logit_scale`, attention's is `attention_scale`: both are part of the function, so
they live in the shape (`entasis.train.recipe.with_mup_scales`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from entasis.shape import layout
from entasis.shape.shapes import ModelShape

Kind = Literal["embedding", "hidden", "head", "vector"]


@dataclass(frozen=True)
class Factors:
    """Factors on the recipe's numbers for one parameter."""

    kind: Kind
    init: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    writes: bool = False
    """Whether the matrix writes into the residual stream."""


def describe(
    shape: ModelShape,
    parametrisation: str = "standard",
    *,
    base_width: int | None = None,
    muon: bool = False,
) -> dict[str, Factors]:
    """The factors of every parameter, by name.

    `base_width` is the d_model at which the learning rate was found; `muon` whether Muon has the hidden matrices.
    """
    result = {}
    for parameter in layout.parameters(shape):
        if parameter.shares is not None:
            continue
        kind = _kind(parameter)
        writes = kind == "hidden" and parameter.axes[0] == "residual"
        result[parameter.name] = Factors(kind, writes=writes)
        if parametrisation == "mup" and kind == "hidden":
            assert base_width, "muP needs base_width"
            fan_out, fan_in = parameter.size
            base_out, base_in = (_mean(shape, axis) / shape.d_model * base_width for axis in parameter.axes)
            m = fan_in / base_in
            lr = _muon(fan_out, fan_in) / _muon(base_out, base_in) if muon else 1 / m
            result[parameter.name] = Factors(kind, init=m**-0.5, lr=lr, weight_decay=1 / lr, writes=writes)
    return result


def _kind(parameter: layout.Parameter) -> Kind:
    if not parameter.is_matrix:
        return "vector"
    if parameter.role in ("embedding", "code", "position"):
        return "embedding"
    return "head" if parameter.role == "head" else "hidden"


def _mean(shape: ModelShape, axis: str) -> float:
    """Length of an axis in the mean of the layers; one without attention, or without FFN, counts as 0 wide."""
    found = [sizes[axis] for layer in shape.layers if axis in (sizes := layout.axis_sizes(shape, layer))]
    return sum(found) / len(found)


def _muon(fan_out: float, fan_in: float) -> float:
    """The spectral norm that an update should have over the one that Muon's has."""
    return math.sqrt(fan_out / fan_in / max(fan_out, fan_in))
