"""Typed reading of a checkpoint's description: a Hugging Face `config.json` or GGUF metadata.

Both come from strangers, so every value is looked at before it is used, and the message names the file
and key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entasis.errors import UserError
from entasis.shape.shapes import ModelShape

_REQUIRED: Any = object()
LARGEST = 2**31 - 1
"""No width, count or context of a real model is larger; keeps arithmetic on hostile values small."""
MOST = 1e15
"""The same for numbers that need not be whole, such as rope_theta."""
MOST_POSITIONS = 2**27


@dataclass(frozen=True)
class Description:
    """What a checkpoint's config or metadata says of its model."""

    shape: ModelShape
    layers: tuple[int, ...] = ()
    """The checkpoint's index of each of our layers; empty: the same."""
    notes: tuple[str, ...] = ()
    """What was done that a user may want to know."""


class ConfigReader:
    """A mapping of keys to values, each read as one type.

    `where` (a file name) and `prefix` (GGUF's `llama.`) say where a key stands, for looking it up and for messages. A
    value that is absent or null counts as not given.
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.values, self.where, self.prefix = values, where, prefix

    def get(self, key: str, default: Any = None) -> Any:
        """The bare value, or `default` where it is absent or null."""
        value = self.values.get(self.prefix + key)
        return default if value is None else value

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        """A whole number from 0 to 2^31 - 1."""
        return self._integer(key, self._given(key, default))

    def integers(self, key: str, count: int, default: Any = _REQUIRED) -> list[int]:
        """One whole number for each of `count` layers; a single number stands for all of them."""
        value = self._given(key, default)
        if not isinstance(value, Sequence) or isinstance(value, str):
            return [self._integer(key, value)] * count
        if len(value) != count:
            raise self.wrong(key, f"a list of {len(value)}", f"one number or one for each of {count} layers")
        return [self._integer(f"{key}[{i}]", x) for i, x in enumerate(value)]

    def number(
        self, key: str, default: Any = _REQUIRED, *, least: float = -MOST, most: float = MOST
    ) -> float:
        """A finite number from `least` to `most`, 10^15 either way."""
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, value, "a number")
        if not least <= value <= most:  # false for NaN too
            raise self.wrong(key, value, f"a finite number from {least:g} to {most:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._given(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        """A string."""
        value = self._given(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a string")
        return value

    def mapping(self, key: str) -> Mapping[str, Any] | None:
        """A nested mapping, or None."""
        value = self.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(key, value, "a mapping")
        return value

    def wrong(self, key: str, value: object, valid: str) -> UserError:
        """The error that says `key` holds `value` where `valid` was needed."""
        return UserError(f"{self.where}: {self.prefix}{shorten(key)} is {_short(value)}; it must be {valid}")

    def refuse(self, key: str, reason: str) -> UserError:
        """The error that says what `key` asks for is nothing our models do."""
        return UserError(f"{self.where}: {self.prefix}{shorten(key)} is {_short(self.get(key))}: {reason}")

    def _given(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is _REQUIRED:
            raise UserError(f"{self.where}: {self.prefix}{key} is missing")
        return value

    def _integer(self, key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST:
            raise self.wrong(key, value, f"a whole number from 0 to {LARGEST}")
        return value


def read_layer_count(config: ConfigReader, key: str, n_tensors: int) -> int:
    """The number of layers. Raises `UserError` where the checkpoint has fewer tensors than layers."""
    count = config.integer(key)
    if not 1 <= count <= n_tensors:
        raise config.wrong(key, count, f"from 1 to {n_tensors}, the number of tensors in the checkpoint")
    return count


def read_context(config: ConfigReader, key: str, default: int) -> int:
    """The longest sequence the model is meant for. Raises `UserError` for more than `MOST_POSITIONS`."""
    length = config.integer(key, default)
    if not 1 <= length <= MOST_POSITIONS:
        raise config.wrong(key, length, f"from 1 to {MOST_POSITIONS}")
    return length


def note_skipped(count: int) -> tuple[str, ...]:
    """The note on blocks that have neither attention nor FFN."""
    return (f"{count} blocks without attention and FFN were left out",) if count else ()


def shorten(name: str) -> str:
    """A stranger's name for a message: unchanged up to 100 characters, else its beginning and end."""
    return name if len(name) <= 100 else f"{name[:60]}…{name[-20:]}"


def _short(value: object) -> str:
    # An int of a million digits or a list of a million entries must not become the message.
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    if (
        not isinstance(value, bool | int | float | str | None)
        and hasattr(value, "__len__")
        and len(value) > 8
    ):
        return f"{len(value)} values"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
