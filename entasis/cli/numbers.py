"""Numbers on the command line: each option says what it can be, and all are checked here, before anything is done.

    parser.add_argument("--steps", type=whole(1), default=20)
    parser.add_argument("--spread", type=real(0, below=1), default=0.3)
    parser.add_argument("--tokens", type=amount(2))       # 20k, 1.5M, 300

argparse names the option in front of what is wrong.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from entasis.errors import UserError

SEEDS = 2**63


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """A whole number from `least` to `most`."""

    def read(text: str) -> int:
        try:
            value = int(text) if len(text) < 40 else None
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise _wrong(text, f"a whole number from {least} to {most}")
        return value

    return read


seed = whole(0, SEEDS - 1)


def real(least: float, most: float = math.inf, *, open: bool = False) -> Callable[[str], float]:
    """A finite number from `least` to `most`; `open` leaves `least` itself out."""
    limit = f"{'above' if open else 'at least'} {least:g}" + (
        f" and at most {most:g}" if most < math.inf else ""
    )

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or value > most or (open and value == least):
            raise _wrong(text, f"a number {limit}")
        return value

    return read


def amount(least: int, most: int = 10**15) -> Callable[[str], int]:
    """A count that may be written 20k, 1.5M or 3B."""

    def read(text: str) -> int:
        from entasis.shape.specification import number

        try:
            value = number(text, "")
        except (UserError, OverflowError):
            value = -1
        if not least <= value <= most:
            raise _wrong(text, f"a number of at least {least}, such as 20k or 1.5M")
        return value

    return read


def _wrong(text: str, wanted: str) -> argparse.ArgumentTypeError:
    shown = text if len(text) <= 40 else f"{text[:40]}…"
    return argparse.ArgumentTypeError(f"{shown!r} must be {wanted}")
