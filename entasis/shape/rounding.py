"""From multipliers to whole heads and FFN widths. A policy is one registered class."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from entasis.errors import UserError
from entasis.registry import Registry

POLICIES: Registry[Callable[..., Rounding]] = Registry("shape: rounding")
_TILES = {"hopper": 128, "other": 64}


@dataclass(frozen=True)
class Rounding:
    """A named policy.

    `ffn` and `heads` turn a wanted width into a valid one; `ffn_multiple` is the step between FFN widths,
    `head_multiple` between numbers of heads.
    """

    name: str
    ffn_multiple: int
    head_multiple: int
    ffn: Callable[[float], int] = field(repr=False)
    heads: Callable[[float], int] = field(repr=False)
    two_decimals: bool = False
    """Whether the multipliers are first rounded to two decimals."""


def policy(name: str, *, head_dim: int, group: int, ffn_multiple: int | None, device: str | None) -> Rounding:
    """The policy called `name`. `group` is the step in query heads that grouped-query attention demands.

    `device` is for tensor-core rounding; None is any but a Hopper GPU. Raises `UserError` for an unknown name or device,
    and for a device beside a policy that knows none.
    """
    rule = POLICIES.find(name)
    if device is not None and device not in _TILES:
        raise UserError(f"shape: device is {device!r}; tensor-core rounding knows {', '.join(_TILES)}")
    if device is not None and rule is not tensor_core:
        raise UserError(
            f"shape: device is {device!r}, which is for rounding: tensor-core; rounding is {name}"
        )
    return rule(head_dim=head_dim, group=group, ffn_multiple=ffn_multiple, device=device or "other")


def make_divisible(value: float, divisor: int, *, strict: bool) -> int:
    """The multiple of `divisor` nearest to `value`, one more where that falls under nine tenths of it.

    `strict` compares with `<` (corenet), otherwise `<=` (the code of 2509.06518).
    """
    if value < divisor:
        return divisor
    result = int(value + divisor / 2) // divisor * divisor
    low = result < 0.9 * value if strict else result <= 0.9 * value
    return result + divisor if low else result


def _divisible(name: str, strict: bool, head_dim: int, group: int, ffn_multiple: int | None) -> Rounding:
    ffn = ffn_multiple or 256
    return Rounding(
        name,
        ffn,
        group,
        ffn=lambda width: make_divisible(width, ffn, strict=strict),
        heads=lambda heads: make_divisible(heads * head_dim, head_dim * group, strict=strict) // head_dim,
        two_decimals=True,
    )


@POLICIES.register("corenet")
def corenet(*, head_dim: int, group: int, ffn_multiple: int | None, device: str) -> Rounding:
    """OpenELM's: FFN in 256s, heads in KV groups; multipliers of two decimals."""
    return _divisible("corenet", True, head_dim, group, ffn_multiple)


@POLICIES.register("crown-paper")
def crown_paper(*, head_dim: int, group: int, ffn_multiple: int | None, device: str) -> Rounding:
    """2509.06518's: as corenet, but exactly nine tenths already rounds up."""
    return _divisible("crown-paper", False, head_dim, group, ffn_multiple)


@POLICIES.register("tensor-core")
def tensor_core(*, head_dim: int, group: int, ffn_multiple: int | None, device: str) -> Rounding:
    """FFN and query widths in whole tiles: 128 elements on Hopper GPUs, 64 elsewhere."""
    tile = _TILES[device]
    return _nearest("tensor-core", math.lcm(group, tile // math.gcd(tile, head_dim)), ffn_multiple or tile)


@POLICIES.register("exact")
def exact(*, head_dim: int, group: int, ffn_multiple: int | None, device: str) -> Rounding:
    """The nearest whole number of heads (in KV groups) and of FFN units."""
    return _nearest("exact", group, ffn_multiple or 1)


def _nearest(name: str, head_multiple: int, ffn_multiple: int) -> Rounding:
    def nearest(value: float, multiple: int) -> int:
        return max(multiple, math.floor(value / multiple + 0.5) * multiple)

    return Rounding(
        name,
        ffn_multiple,
        head_multiple,
        ffn=lambda width: nearest(width, ffn_multiple),
        heads=lambda heads: nearest(heads, head_multiple),
    )
