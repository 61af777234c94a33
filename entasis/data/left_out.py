"""Says what was not read, or not as it stood: one line for each reason, with how many, their bytes and the first names."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from entasis.data.readers import REPLACED

_LEAST_LOST = 1e-4
"""Share of a text's bytes below which no bits per byte show that the tokenizer loses them."""
_LONGEST_NAME = 120
"""Characters; a reason may stand behind a name."""


def lines(left_out: Mapping[str, dict[str, Any]]) -> list[str]:
    """One line for each reason of `Losses.reasons`."""
    return [
        counted(reason if reason == REPLACED else f"left out ({reason})", entry)
        for reason, entry in left_out.items()
    ]


def tell(left_out: Mapping[str, dict[str, Any]]) -> None:
    """Prints these lines on stderr, so that the answer on stdout stays clean."""
    for line in lines(left_out):
        print(f"entasis: {line}", file=sys.stderr)


def lost_by_tokenizer(share: float | None) -> str | None:
    """One line on the share of a text that its ids do not give back; None where it is nothing, or was not measured."""
    if share is None or share < _LEAST_LOST:
        return None
    return f"the tokenizer loses {100 * share:.3g} % of the text: its bits per byte cannot be compared with others'"


def counted(reason: str, entry: Mapping[str, Any]) -> str:
    """One line: how many, their bytes, the first names."""
    size = f"{entry['bytes'] / 1e6:,.1f} MB" if entry["bytes"] >= 100_000 else f"{entry['bytes']:,} bytes"
    more = ", …" if entry["count"] > len(entry["first"]) else ""
    names = ", ".join(n if len(n) <= _LONGEST_NAME else f"{n[:_LONGEST_NAME]}…" for n in entry["first"])
    return f"{reason}: {entry['count']:,} ({size}): {names}{more}"
