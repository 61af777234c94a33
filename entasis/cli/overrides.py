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
        valued = {s for a in parser._actions if a.nargs is None for s in a.option_strings}
        spelt, before = [], ""
        for word in args or []:
            free = before not in valued and (dashes or not word.startswith("-"))
            spelt.append(f"--set={word.removeprefix('--')}" if free and _OVERRIDE.fullmatch(word) else word)
            before = word
        return parse(spelt, namespace)

    parser.parse_known_args = parse_overrides  # type: ignore[method-assign]
