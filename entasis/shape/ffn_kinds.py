"""Kinds of feed-forward network: which matrices each has, without torch.

    register(FFNKind("low_rank", matrices=(("reduce", ("rank", "residual")), …), kept=…, numbers=("rank",)))

A kind is one entry here and one module registered under the same name in `entasis.model.feedforward`. The layout, and
through it counts, FLOPs, initial values, optimizer groups and memory, follow from the entry; whoever cannot hold a
kind (an export, a neighbour's weights) refuses it by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from entasis.registry import Registry

Sizes = Mapping[str, int]
"""Axis → its size: `residual`, `ffn` and the numbers of the kind."""


@dataclass(frozen=True)
class FFNKind:
    """What an FFN of one kind is made of."""

    name: str
    matrices: tuple[tuple[str, tuple[str, ...]], ...]
    """(name of the projection, axes of its weight); the first axis is what it writes, the last what it reads."""
    kept: Callable[[Sizes], int]
    """Numbers that one token leaves for the backward pass, between the matrices."""
    numbers: tuple[str, ...] = ()
    """What a layer of this kind says beside `d_ff`; each may be an axis."""

    @property
    def reading(self) -> int:
        """How many matrices read the residual stream."""
        return sum(axes[-1] == "residual" for _, axes in self.matrices)


KINDS: Registry[FFNKind] = Registry("ffn kind")


def register(kind: FFNKind) -> FFNKind:
    """Makes a kind known by its name."""
    return KINDS.register(kind.name)(kind)


register(
    FFNKind(
        "swiglu",
        matrices=(("gate", ("ffn", "residual")), ("up", ("ffn", "residual")), ("down", ("residual", "ffn"))),
        # gate's output, its silu, up's output and their product
        kept=lambda sizes: 4 * sizes["ffn"],
    )
)
for _name in ("gelu", "gelu_tanh"):
    register(
        FFNKind(
            _name,
            matrices=(("up", ("ffn", "residual")), ("down", ("residual", "ffn"))),
            kept=lambda sizes: 2 * sizes["ffn"],
        )
    )
