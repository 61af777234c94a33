"""Study files: read by name or path, at one of their sizes, as changes to a shipped one, with `key=value` overrides."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from entasis.configuration import Settings, load_yaml, parse
from entasis.errors import UserError
from entasis.registry import advise
from entasis.study.config import Study, changed


class _Frame(Settings):
    """The keys of a study file that choose what the others are."""

    sizes: dict[Any, dict[str, Any] | None] | None = None
    size: str | int | None = None
    extends: str | None = None
    base: dict[str, Any] | None = None
    corpora: dict[Any, Any] | None = None


def shipped() -> list[str]:
    """Names of the studies that come with the package."""
    folder = resources.files("entasis.study").joinpath("studies")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def read(path_or_name: str | Path, *, size: str | None = None, overrides: Sequence[str] = ()) -> Study:
    """The study in a YAML file, or a shipped one by its name, at one of its `sizes` where it has any.

    `overrides` are `key=value` with dots for keys inside keys (`seeds=5`, `base.tokens=2M`).

    Raises `UserError` naming the file, the key, its value and what would be valid.
    """
    path = Path(path_or_name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"study {path}: no such file")
        name, where = path.stem, f"study {path}"
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: cannot be read: {error}") from error
    elif str(path_or_name) in shipped():
        name, where = str(path_or_name), f"study {path_or_name}"
        text = (
            resources.files("entasis.study").joinpath("studies", f"{name}.yaml").read_text(encoding="utf-8")
        )
    else:
        raise UserError(
            f"study {path_or_name}: neither a YAML file nor a shipped study; {advise(path_or_name, shipped())}"
        )
    source = load_yaml(text, where)
    changes = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"override {override!r}: write key=value, as in seeds=5")
        changes[key] = load_yaml(value, f"override {override!r}")
    return from_dict(source, name=name, where=where, size=size, changes=changes)


def from_dict(
    source: Any,
    *,
    name: str,
    where: str = "study",
    size: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Study:
    """A study from a plain mapping; see `read`. `changes` are dot-keys set after the size is chosen."""
    if not isinstance(source, Mapping):
        raise UserError(f"{where}: must be a mapping with base: and arms:")
    _check_keys(source, [*_KEYS, "sizes", "size", "extends"], where)
    parse(_Frame, {key: source[key] for key in _Frame.model_fields if key in source}, where)
    own = {"name": name, **copy.deepcopy(dict(source))}
    plain = _extended(own, size, where) if "extends" in own else _at_size(own, size, where)
    for key, value in (changes or {}).items():
        plain = _overridden(plain, key, value)
    _check_keys(plain, _KEYS, where)
    return parse(Study, plain, where)


def _overridden(plain: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The study with one dot-key set. What an arm, a trunk or the sweep changes is dot-keys itself: what follows stays one."""
    head, _, rest = key.partition(".")
    if head in ("arms", "trunks") and "." in rest:
        # Names may hold dots.
        known = [name for name in plain.get(head) or {} if rest.startswith(f"{name}.")]
        name = max(known, key=len, default=rest.partition(".")[0])
        rest = rest[len(name) + 1 :]
    elif key.startswith("sweep.changes."):
        name, rest = "changes", key.removeprefix("sweep.changes.")
        if isinstance(plain.get("sweep"), list):
            plain = {**plain, "sweep": {"multipliers": plain["sweep"]}}
    else:
        return changed(plain, {key: value})
    holder = plain.get(head) or {}
    changes = (holder.get(name) or {}) if isinstance(holder, Mapping) else holder
    if not isinstance(changes, Mapping):
        raise UserError(f"override {key}: what it is set in is {changes!r}; it must be a mapping")
    changes = dict(changes)
    if around := next((k for k in changes if rest.startswith(f"{k}.")), None):
        changes[around] = changed({"": changes[around]}, {rest[len(around) :]: value})[""]
    else:
        # Last, so that nothing that is there undoes it.
        changes.pop(rest, None)
        changes[rest] = copy.deepcopy(value)
    return {**plain, head: {**holder, name: changes}}


def _at_size(source: dict[str, Any], size: str | None, where: str) -> dict[str, Any]:
    """The study at one size: `sizes` holds, per name, changes to the base (dot-keys) and other keys replaced."""
    # Names may be numbers.
    sizes = {str(name): over for name, over in (source.pop("sizes", None) or {}).items()}
    size = _size(source, size)
    if size is None:
        if sizes:
            raise UserError(f"{where}: choose a --size: {', '.join(sizes)}")
        return source
    if size not in sizes:
        known = f"; it has {', '.join(sizes)}" if sizes else "; it has no sizes"
        raise UserError(f"{where}: there is no size {size!r}{known}")
    over = dict(sizes[size] or {})
    if not isinstance(over.get("base", {}), Mapping):
        raise UserError(f"{where}: sizes.{size}.base is {over['base']!r}; it must be a mapping")
    _check_keys(over, _KEYS, f"{where}: sizes.{size}")
    source["base"] = changed(source.get("base") or {}, over.pop("base", {}))
    source["name"] = f"{source['name']}-{size}"
    return {**source, **over}


def _size(source: dict[str, Any], asked: str | None) -> str | None:
    """The size that is asked for, or else the file's own, which is taken out of it."""
    own = source.pop("size", None)
    return asked or (None if own is None else str(own))


def _extended(source: dict[str, Any], size: str | None, where: str) -> dict[str, Any]:
    """A shipped study at one of its sizes, with this one's changes: to the base by dot-keys, corpora added."""
    parent = str(source.pop("extends"))
    if parent not in shipped():
        raise UserError(f"{where}: extends is {parent!r}, not a shipped study; {advise(parent, shipped())}")
    text = resources.files("entasis.study").joinpath("studies", f"{parent}.yaml").read_text(encoding="utf-8")
    name = source.pop("name")
    size = _size(source, size)
    plain = _at_size({"name": name, **load_yaml(text, f"study {parent}")}, size, f"study {parent}")
    plain["base"] = changed(plain["base"], source.pop("base", {}))
    plain["corpora"] = {**plain.get("corpora", {}), **source.pop("corpora", {})}
    return {**plain, **source}


_KEYS = [name for name in Study.model_fields if name != "controls"]
"""What a study file may hold; controls are marked where the arms are."""


def _check_keys(source: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in source:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; {advise(key, known)}")
