"""Files that people write, read into typed settings: one line says which key is wrong, and what it may be.

class BatchSize(Settings):
    tokens: Count = 65_536

parse(BatchSize, load_yaml(text, "recipe r.yaml"), "recipe")
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import annotated_types
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from entasis import quantities
from entasis.errors import UserError
from entasis.registry import advise

M = TypeVar("M", bound="Settings")


class Settings(BaseModel):
    """A part of a file: unknown keys, wrong types and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)

    renamed: ClassVar[Mapping[str, str]] = {}
    """Keys of earlier versions and what they are called now."""

    def replaced(self, **changes: Any) -> Self:
        """A copy with other values, which are not checked."""
        return self.model_copy(update=changes)

    def narrowed(self, kind: type[M], **changes: Any) -> M:
        """These values and `changes` as settings of a narrower kind, which has to allow them."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return kind.model_validate({**values, **changes})


HERE = "\x00"
"""Stands for the field in messages of its own checks until its place is known."""

Count = Annotated[int, BeforeValidator(lambda value: quantities.count(value, HERE))]
"""393216, 393_216, "200k", "5B"."""
TokenCount = Annotated[
    int | str,
    BeforeValidator(
        lambda value: value if quantities.is_share(value, HERE) else quantities.count(value, HERE)
    ),
]
"""A number of tokens, or a share of all: "200k", "33%"."""
Size = Annotated[int, BeforeValidator(lambda value: quantities.size(value, HERE))]
"""Bytes: "8GiB", "500MB"."""
Steps = Annotated[
    int | str, BeforeValidator(lambda value: (quantities.steps(value, quantities.MOST, HERE), value)[1])
]
"""A number of steps, or a share of all steps: 100, "2%"."""
Share = Annotated[float, BeforeValidator(lambda value: quantities.share(value, HERE))]
"""0.05, "5%"."""


def parse(kind: type[M], source: object, where: str) -> M:
    """`source`, a plain mapping, as settings of a `kind`. Raises `UserError`, which begins with `where`."""
    try:
        return kind.model_validate(source)
    except ValidationError as error:
        # A misspelt key is told before what its absence leads to.
        first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        raise UserError(f"{where}: {_one_line(first, kind, source)}") from error


def _one_line(error: ErrorDetails, kind: type[Settings], source: object) -> str:
    path, hint, value = _locate(error["loc"], kind, source)
    if error["type"] == "extra_forbidden":
        *outer, key = error["loc"]
        path, hint, _ = _locate(tuple(outer), kind, source)
        inside = _settings_in(hint)
        assert inside is not None
        prefix = f"{path}." if path else ""
        if str(key) in inside.renamed:
            return f"unknown key {prefix}{key}; it is called {prefix}{inside.renamed[str(key)]} now"
        known = [f.alias or name for name, f in inside.model_fields.items()]
        return f"unknown key {prefix}{key}; {advise(key, known, prefix=prefix)}"
    if error["type"] == "missing":
        return f"{path} is missing"
    raised = error.get("ctx", {}).get("error")
    if isinstance(raised, UserError):
        return str(raised).replace(HERE, path)
    if error["type"] == "value_error":
        return f"{path}: {raised}" if path else str(raised)
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"
    return f"{path or 'it'} is {shown}; it must be {describe(hint)}"


def _locate(location: tuple[int | str, ...], kind: type[Settings], source: object) -> tuple[str, Any, object]:
    """(dotted path, annotation, value) of the field that an error is about; what names a union's branch is left out."""
    path, hint, value = "", typing.cast(Any, kind), source
    for step in location:
        inside = _settings_in(hint)
        if isinstance(step, int) and isinstance(value, list | tuple):
            path, hint = f"{path}[{step}]", next(iter(typing.get_args(_sequence_in(hint))), Any)
            value = value[step] if step < len(value) else None
            continue
        if isinstance(value, Mapping) and step in value and (entry := _entries_in(hint)) is not None:
            path, hint, value = f"{path}.{step}", entry, value[step]
            continue
        fields = inside.model_fields.items() if inside else ()
        field = next((f for n, f in fields if step in (n, f.alias)), None)
        if field is None:
            continue
        path = f"{path}.{step}".lstrip(".")
        hint = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        value = value.get(step) if isinstance(value, Mapping) else value
    return path, hint, value


def _settings_in(hint: Any) -> type[Settings] | None:
    """The settings in `X`, `X | None` or `list[X]`."""
    for candidate in (hint, *typing.get_args(hint)):
        if isinstance(candidate, type) and issubclass(candidate, Settings):
            return candidate
        if candidate is not hint and (found := _settings_in(candidate)):
            return found
    return None


def _entries_in(hint: Any) -> Any:
    """The `X` in `dict[str, X]`, also as one of several kinds; None where there is no such."""
    if typing.get_origin(hint) is dict:
        return typing.get_args(hint)[1]
    return next((found for x in typing.get_args(hint) if (found := _entries_in(x)) is not None), None)


def _sequence_in(hint: Any) -> Any:
    """The `list[X]` or `tuple[X, …]` in `list[X] | None`."""
    options = (hint, *typing.get_args(hint))
    return next((x for x in options if typing.get_origin(x) in (list, tuple)), list[Any])


def describe(hint: Any) -> str:
    """What a value of this annotation may be, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(str(x) for x in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(x) for x in arguments))
    if origin is Annotated:
        limits = [text for limit in arguments[1:] for text in _limits(limit)]
        return f"{describe(arguments[0])} {' and '.join(limits)}".rstrip()
    if origin in (list, tuple):
        inside = [describe(x) for x in arguments if x is not ...]
        return (
            f"a list of {inside[0]}"
            if origin is list or ... in arguments
            else f"a list of {len(inside)}, each {inside[0]}"
        )
    if _settings_in(hint) is not None or origin is dict:
        return "a mapping"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint) or str(getattr(hint, "__name__", hint))


def _limits(limit: object) -> list[str]:
    words = {
        annotated_types.Gt: ("gt", "above"),
        annotated_types.Ge: ("ge", "of at least"),
        annotated_types.Lt: ("lt", "below"),
        annotated_types.Le: ("le", "at most"),
    }
    for kind, (name, word) in words.items():
        if isinstance(limit, kind) and abs(getattr(limit, name)) < _UNSAID:
            return [f"{word} {getattr(limit, name):g}"]
    if hasattr(limit, "metadata"):
        return [text for part in limit.metadata for text in _limits(part)]
    return []


_UNSAID = 10_000
"""Limits from here on only catch typing errors."""


class _Loader(yaml.SafeLoader):
    """YAML in which, as in YAML 1.2, `1e-5` is a number and `on` a word; a key may stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, words) for tag, words in known if tag != _BOOL]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$|[-+]?\.\d+[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_yaml(text: str, where: str) -> Any:
    """The content of a YAML text. Raises `UserError`, which begins with `where`.

    Aliases that hold themselves, duplicate keys and bottomless nesting are refused.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_depth(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where}: not usable YAML: {str(error)[:200]}") from error


def _check_depth(node: yaml.Node) -> None:
    """Refuses a node that holds itself, or a text whose aliases unfold without bound."""
    left = 1_000_000

    def walk(node: yaml.Node, above: tuple[int, ...]) -> None:
        nonlocal left
        left -= 1
        if id(node) in above:
            raise ValueError("an alias refers to itself")
        if len(above) > 100 or left < 0:
            raise ValueError("nested too deep, or aliases unfold without bound")
        for child in node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else ():
            for part in child if isinstance(child, tuple) else (child,):
                walk(part, (*above, id(node)))

    walk(node, ())


def read_yaml(file: Path | Traversable, where: str, advice: str = "") -> Any:
    """The content of a YAML file. Raises `UserError`, with `advice` where the file cannot be read."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read: {error}{advice}") from error
    return load_yaml(text, where)
