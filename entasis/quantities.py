"""Numbers as people write them: `200k` tokens, `8GiB`, `2%` of the steps. Messages name the field."""

from __future__ import annotations

import math
import re

from entasis.errors import UserError

MOST = 10**18
"""Larger numbers are typing errors."""


def count(value: object, where: str) -> int:
    """How many: `393_216`, `"200k"`, `"1.5B"`, `"1e6"`; at least 1. Raises `UserError`."""
    result = _scaled(value)
    if not 1 <= result <= MOST:
        raise UserError(f"{where} is {value!r}; write a number such as 393_216, 200k, 5M or 1.5B")
    return round(result)


def size(value: object, where: str) -> int:
    """Bytes: `8GiB`, `500MB`, `8_000_000_000`. Raises `UserError`."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?) ?(?:([kKMGT])(i?))?B?", str(value).strip())
    result = 0.0
    if match and not isinstance(value, bool):
        scale = (1024 if match[3] else 1000) ** (" KMGT".index(match[2].upper()) if match[2] else 0)
        result = float(match[1].replace("_", "")) * scale
    if not 1 <= result <= MOST:
        raise UserError(f"{where} is {value!r}; write a size such as 8GiB, 500MB or 8_000_000_000")
    return round(result)


def steps(value: object, total: float, where: str) -> int:
    """A number of steps (100), or a share (`"2%"`) of `total`. Raises `UserError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", str(value).strip())
    if match and match[2] and float(match[1]) <= 100:
        return round(float(match[1]) / 100 * total)
    if match and not match[2] and "." not in match[1] and float(match[1]) <= MOST:
        return int(match[1])
    raise UserError(f"{where} is {value!r}; write a number of steps (100) or a share of them (2%)")


def is_share(value: object, where: str) -> bool:
    """Whether a value is written as a share, `"33%"`. Raises `UserError` for one that is none from 0 to 1."""
    return isinstance(value, str) and value.strip().endswith("%") and share(value, where) >= 0


def tokens(value: object, total: int | None, batch: int, where: str) -> int:
    """How many tokens: a number (`200k`), or a share (`"33%"`) of `total` in whole batches. Raises `UserError`."""
    if not is_share(value, where):
        return count(value, where)
    if total is None:
        raise UserError(f"{where} is {value!r}, a share of tokens, which says nothing; give tokens a number")
    if not (part := share(value, where)):
        raise UserError(f"{where} is {value!r}, which is no step; leave the stage out")
    return max(1, round(part * total / batch)) * batch


def share(value: object, where: str) -> float:
    """A part of the whole: 0.05 or `"5%"`; from 0 to 1. Raises `UserError`."""
    text = str(value).strip()
    try:
        result = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        result = math.nan
    if isinstance(value, bool) or not 0 <= result <= 1:
        raise UserError(f"{where} is {value!r}; write a share such as 0.05 or 5%")
    return result


def _scaled(value: object) -> float:
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:e\+?\d{1,3})?)\s*([kKMBGT]?)", str(value).strip())
    if isinstance(value, bool) or not match or len(match[1]) > 40:
        return math.nan
    scale = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}[match[2].upper()]
    return float(match[1].replace("_", "")) * scale
