"""`key=value` anywhere on the command line of a verb that reads a recipe."""

from __future__ import annotations

import argparse
import re
from typing import Any

_OVERRIDE = re.compile(r"(--)?(?!output=|set=|steps=)[A-Za-z_]\w*(\.\w+)*=.*", re.DOTALL)


def accept(parser: argparse.ArgumentParser, *, dashes: bool = True) -> None:
    """Collects `key=value`, and with `dashes` `--key=value`, wherever they stand, in `args.set`."""
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=argparse.SUPPRESS)
    parse = parser.parse_known_args

    def parse_overrides(args: Any = None, namespace: Any = None) -> Any:
        # argparse takes free positionals in one block only; as options overrides may stand anywhere.
        spelt = [
            f"--set={a.removeprefix('--')}"
            if _OVERRIDE.fullmatch(a) and (dashes or not a.startswith("-"))
            else a
            for a in args or []
        ]
        return parse(spelt, namespace)

    parser.parse_known_args = parse_overrides  # type: ignore[method-assign]
