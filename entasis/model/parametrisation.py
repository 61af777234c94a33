"""What each parameter is, and how its learning rate, decay and initial size follow from its own fan-in.

Standard parametrisation leaves every factor at 1. Under muP (2203.03466, Table 8, for AdamW), with
`m = fan_in / base fan_in` of each matrix:

| parameter                  | init std | learning rate | weight decay |
|----------------------------|----------|---------------|--------------|
| hidden matrix              | σ / √m   | 1 / m         | m            |
| untied head                | σ        | 1             | 1            |
| embedding, position table  | σ        | 1             | 1            |
| vector (norm, bias)        | –        | 1             | 1            |

The head's share of muP is the shape's `logit_scale` (base width / d_model), attention's is `attention_scale`
(1 / head_dim): both are part of the function, so they live in the shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

Kind = Literal["embedding", "hidden", "head", "vector"]


@dataclass(frozen=True)
class Rule:
    """Factors on the recipe's numbers for one parameter."""

    kind: Kind
    fan_in: int
    init: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


def kind_of(name: str, parameter: nn.Parameter) -> Kind:
    """The kind of the parameter called `name` in a `Transformer`."""
    if parameter.ndim < 2:
        return "vector"
    if name.startswith("embedding."):
        return "embedding"
    return "head" if name == "head.weight" else "hidden"


def describe(
    model: nn.Module, parametrisation: str = "standard", *, base_width: int | None = None
) -> dict[str, Rule]:
    """The rule of every parameter, by name.

    `base_width` is the d_model at which the learning rate was found. Every hidden matrix's fan-in is measured
    against the one that its kind has in a model of that width with one head width per d_model and an FFN of the
    same ratio, so a layer twice as wide as the base's gets half its learning rate on `down`, and so on.
    """
    result = {}
    for name, parameter in model.named_parameters():
        kind = kind_of(name, parameter)
        fan_in = parameter.shape[-1]
        if parametrisation == "mup" and kind == "hidden":
            assert base_width, "muP needs base_width"
            m = fan_in / _base_fan_in(name, base_width)
            result[name] = Rule(kind, fan_in, init=m**-0.5, lr=1 / m, weight_decay=m)
        else:
            result[name] = Rule(kind, fan_in)
    return result


def _base_fan_in(name: str, base_width: int) -> int:
    return 4 * base_width if name.endswith("feedforward.down.weight") else base_width
