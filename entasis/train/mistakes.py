"""Mistakes in a recipe, told in one line: which key, what it is, what it may be."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from entasis.errors import UserError


def check_keys(source: Any, kind: type, prefix: str = "") -> None:
    """Refuses keys that the dataclass `kind` does not have, naming the nearest."""
    if source is None:
        return
    if not isinstance(source, Mapping):
        raise UserError(f"recipe: {prefix.rstrip('.') or 'the recipe'} is {source!r}; it must be a mapping")
    hints = typing.get_type_hints(kind)
    for key, value in source.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            advice = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(hints)}"
            raise UserError(f"recipe: unknown key {prefix}{key}; {advice}")
        part_of = _dataclass_in(hints[key])
        if part_of is not None and isinstance(value, list):
            for i, item in enumerate(value):
                check_keys(item, part_of, f"{prefix}{key}[{i}].")
        elif part_of is not None:
            check_keys(value, part_of, f"{prefix}{key}.")


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass in `X`, `X | None` or `list[X]`."""
    for candidate in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(candidate) and isinstance(candidate, type):
            return candidate
    return None


def one_line(message: str, source: Mapping[str, Any], recipe: type) -> str:
    """jsonargparse's many lines about a wrong type, as one: the key, its value, what it may be."""
    path = ".".join(re.findall(r'[Pp]arser key "([^"]+)"', message)).removeprefix("recipe.")
    kind: Any = recipe
    value: Any = source
    for name in path.split("."):
        hints = typing.get_type_hints(kind) if kind else {}
        if name not in hints:
            return f"recipe: {' '.join(message.split())}"
        expected = hints[name]
        kind = _dataclass_in(expected)
        value = value.get(name) if isinstance(value, Mapping) else value
        if isinstance(value, list) and kind:
            # jsonargparse names the list; the value is its last word.
            given = re.search(r"Given value: (.*)\s*$", message)
            return (
                f"recipe: {path} holds the value {given[1] if given else value!r}, which is of the wrong type"
            )
    return f"recipe: {path} is {value!r}; it must be {_describe(expected)}"


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(str(x) for x in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(x) for x in typing.get_args(hint))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint) or str(getattr(hint, "__name__", hint) if not typing.get_args(hint) else hint)
