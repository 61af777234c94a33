"""Initial values.

| parameter                                   | standard                 | mup (m = fan_in / base fan_in) |
|---------------------------------------------|--------------------------|--------------------------------|
| token embedding, position table             | N(0, 0.02²)              | N(0, 0.02²)                    |
| query, key, value, gate, up                 | N(0, 0.02²)              | N(0, 0.02² / m)                |
| attention.output, feedforward.down          | N(0, 0.02² / 2L)         | N(0, 0.02² / 2L / m)           |
| the same two, with `norm_scaling` or a      | N(0, 0.02²)              | N(0, 0.02² / m)                |
| `residual_scale` other than 1               |                          |                                |
| untied head                                 | N(0, 0.02²)              | N(0, 0.02²)                    |
| table of the interface `random`             | N(0, std²) of its own    | the same                       |
| other frozen tables                         | what they are            | the same                       |
| norm weights                                | 1                        | 1                              |
| biases                                      | 0                        | 0                              |

L is the number of layers; the factor 1/2L is GPT-2's. LayerNorm scaling replaces it (2502.05795, section 3).

Every parameter draws from a generator of its own, seeded by (seed, its name): a parameter of the same name and
shape has the same initial values in any two models, whatever the rest of them looks like. That pairs the arms of a
study. With `nested` (`init: nested` in a recipe) every row of a head or FFN unit has a generator of its own, seeded by its number
too: a layer with fewer of them then begins as the first of a wider one's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from entasis.model import parametrisation as factors_of
from entasis.model.transformer import Transformer
from entasis.shape import layout
from entasis.shape.interfaces import FULL, Random
from entasis.shape.shapes import ModelShape

STD = 0.02


@torch.no_grad()
def init_weights(
    model: Transformer,
    seed: int,
    *,
    parametrisation: str = "standard",
    base_width: int | None = None,
    tokenizer: Path | None = None,
    tables_of: Transformer | None = None,
    nested: bool = False,
) -> None:
    """Fills every parameter of `model` in place; drawn on the CPU in fp32, so the device does not matter.

    Frozen tables that are not drawn from the seed are those of `tables_of`, a model of the same shape, or made anew; an
    interface that draws the tokens' text reads the file `tokenizer`. Raises `UserError` without it.
    """
    shape, parameters = model.shape, dict(model.named_parameters())
    drawn = [*layout.learnable(shape), *([FULL] if isinstance(shape.interface, Random) else [])]
    values = draw(shape, drawn, seed, parametrisation=parametrisation, base_width=base_width, nested=nested)
    for name, value in values:
        parameters[name].copy_(value)
    if tables_of is not None:
        for name in parameters.keys() - drawn:
            parameters[name].copy_(tables_of.get_parameter(name))
    elif parameters.keys() - drawn:
        model.embedding.tokens.fill(tokenizer)  # type: ignore[operator]


def draw(
    shape: ModelShape,
    names: Iterable[str],
    seed: int,
    *,
    parametrisation: str = "standard",
    base_width: int | None = None,
    nested: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, initial value) of these parameters of a model, one at a time, in fp32 on the CPU.

    With `nested` each head's and each FFN unit's numbers depend on its place alone, not on how many there are.
    """
    described = factors_of.describe(shape, parametrisation, base_width=base_width)
    sizes = layout.sizes(shape)
    axes = {p.name: p.axes for p in layout.parameters(shape) if p.layer is not None} if nested else {}
    branch_scaled = shape.norm_scaling or shape.residual_scale != 1.0
    depth = 1.0 if branch_scaled else 1 / math.sqrt(2 * shape.n_layers)
    for name in names:
        if name == FULL and isinstance(table := shape.interface, Random):
            own = seed if table.seed is None else table.seed
            yield name, draw_normal(sizes[name], own, name) * table.std
            continue
        factors = described[name]
        if factors.kind == "vector":
            yield name, torch.full(sizes[name], 0.0 if name.endswith("bias") else 1.0)
            continue
        std = STD * factors.init * (depth if factors.writes else 1.0)
        normal = (
            draw_nested(sizes[name], axes[name], seed, name)
            if name in axes
            else draw_normal(sizes[name], seed, name)
        )
        yield name, normal * std


def draw_normal(size: tuple[int, ...], seed: int, name: str) -> torch.Tensor:
    """Standard normal numbers in fp32 that depend on nothing but these three."""
    return torch.randn(size, generator=generator(seed, name))


def draw_nested(size: tuple[int, ...], axes: tuple[str, ...], seed: int, name: str) -> torch.Tensor:
    """Standard normal numbers of a layer's matrix, drawn for each row of its heads or FFN units apart: those of a narrower
    layer are the first of a wider one's."""
    across = next(i for i, axis in enumerate(axes) if axis != "residual")
    rest = size[1 - across]
    rows = [torch.randn(rest, generator=generator(seed, f"{name}/{unit}")) for unit in range(size[across])]
    return torch.stack(rows, dim=across)


def generator(seed: int, name: str) -> torch.Generator:
    """Random numbers of a parameter's own."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
