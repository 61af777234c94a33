"""What a part of the program knows of a layer: a field that it does not know is refused there, never dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from entasis.errors import UserError
from entasis.shape.shapes import LayerShape

WIDTHS = ("n_heads", "n_kv_heads", "d_ff")


def require(layers: Iterable[LayerShape], who: str, known: tuple[str, ...] = WIDTHS) -> None:
    """Raises `UserError` in the name of `who` for a layer that has another field than those `known`.

    A field at its default says nothing and may be there.
    """
    for i, layer in enumerate(layers):
        for field in dataclasses.fields(layer):
            value = getattr(layer, field.name)
            if field.name not in known and (field.default is dataclasses.MISSING or value != field.default):
                raise UserError(
                    f"{who}: layer {i} has {field.name} {value!r}, and only {', '.join(known)} are known here"
                )
