"""Three layers in a row, the middle one to be predicted from the other two: which are learnt from and which are held out."""

from __future__ import annotations

import random
from dataclasses import dataclass

from entasis.errors import UserError
from entasis.shape.shapes import ModelShape

HELD_OUT = 0.1
"""Part of the triples that is held out, at least one."""


@dataclass(frozen=True)
class Split:
    """The middle layers of the triples."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]


def check_layers(shape: ModelShape, operator: str) -> None:
    """Raises `UserError` for a model whose layers have no basis in common, or are fewer than four."""
    if shape.n_layers < 4:
        raise UserError(
            f"grow: {operator}: the model has {shape.n_layers} layers; four are needed, to learn from and to hold out"
        )
    for i, layer in enumerate(shape.layers):
        if layer != shape.layers[0]:
            raise UserError(
                f"grow: {operator}: layer {i} has another shape than layer 0; their matrices have no basis in common"
            )


def split(n_layers: int, seed: int) -> Split:
    """Which triples of at least four layers are held out, drawn by `seed`; the same for every matrix.

    A held-out layer is never a target; as an input, and in the basis that all layers share, it does appear.
    """
    middles = list(range(1, n_layers - 1))
    held = sorted(random.Random(seed).sample(middles, max(1, round(HELD_OUT * len(middles)))))
    return Split(tuple(i for i in middles if i not in held), tuple(held))
