"""When to stack a model that is to be trained with a given budget (G_stack, 2405.15319, section on growth timing)."""

from __future__ import annotations

import math

from entasis.errors import UserError

PARAMETERS = (410e6, 7e9)
COMPUTE = (1e20, 3.2e22)
"""Sizes of the models in the paper, and FLOPs as 6 · parameters · tokens of the smallest at 40 B and the largest at 750 B
tokens. Outside the fit means nothing: a model of 4 M parameters would have to be grown after 10¹¹ tokens or more."""


def tokens_before_growth(parameters: float, compute: float) -> int:
    """Tokens d to train the small model on: log10 d = 0.88 log10 N + 163.27 / log10 C − 5.74.

    `parameters` N are those of the grown model, `compute` C the FLOPs of the whole training. Raises `UserError` outside the
    range of the fit.
    """
    for what, value, (least, most) in (
        ("parameters", parameters, PARAMETERS),
        ("FLOPs", compute, COMPUTE),
    ):
        if not least <= value <= most:
            raise UserError(
                f"grow: the timing formula of G_stack was fitted on {least:.2g} to {most:.2g} {what}, and this is "
                f"{value:.3g}; choose a share of the tokens instead, such as 10, 25 or 50 %"
            )
    return round(10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(compute) - 5.74))
