"""Things known by name: profiles, importers, measures and the like, each registered in its own file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from entasis.errors import UserError

T = TypeVar("T")
F = TypeVar("F")


class Registry(dict[str, T], Generic[T]):
    """Name → thing. `what` is what messages call such a thing, as in `shape: profile`."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def register(self, name: str) -> Callable[[F], F]:
        """A decorator that makes a function or class known by `name`."""

        def add(thing: F) -> F:
            assert name not in self, f"{self.what} {name} is registered twice"
            self[name] = thing  # type: ignore[assignment]
            return thing

        return add

    def find(self, name: object) -> T:
        """The thing called `name`. Raises `UserError` with the nearest name, or all of them."""
        if not isinstance(name, str) or name not in self:
            raise UserError(f"{self.what} {name!r} is not known; {advise(name, self)}")
        return self[name]


def advise(name: object, known: Iterable[str], *, prefix: str = "") -> str:
    """`did you mean X?`, or what there is to choose from."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {prefix}{near[0]}?" if near else f"choose one of {', '.join(known)}"
