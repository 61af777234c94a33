"""Where layers are inserted: "after i" is between layer i and layer i + 1.

| written        | means, in a model of L layers                                                                  |
|----------------|------------------------------------------------------------------------------------------------|
| `[3, 7]`, `3,7`| after these                                                                                    |
| `15..28`       | after 15, 16, … 28                                                                             |
| `uniform:n`    | n places spread evenly over 0 … L−2: after ⌊(2k+1)(L−1) / 2n⌋ for k < n                        |
| `top:n`        | the last n of 0 … L−2                                                                          |
| `middle:n`     | n in the middle of 0 … L−2                                                                     |
| `blocks:n`     | LLaMA Pro's own (2401.02415): n equal groups of layers, after the last of each, after L−1 too  |

The named sets but `blocks` keep between two layers, so that they are the same places for every operator; after L−1 can
only something come that needs no neighbour on the other side.
"""

from __future__ import annotations

import itertools
import re

from entasis.errors import UserError

Positions = list[int] | int | str
"""As a recipe or the command line has them."""


def resolve(
    after: Positions, n_layers: int, *, between: bool = False, where: str = "grow"
) -> tuple[int, ...]:
    """The places meant, ascending; `between` refuses the one after the last layer.

    Raises `UserError`, which begins with `where`, for places that are not there and for one that is named twice.
    """
    found = sorted(_listed(after, n_layers, where))
    last = n_layers - 2 if between else n_layers - 1
    if wrong := [i for i in found if not 0 <= i <= last]:
        why = " (it needs a layer on either side)" if between and wrong[0] == n_layers - 1 else ""
        raise UserError(
            f"{where}: after {wrong[0]} is not a place in {n_layers} layers; they go from 0 to {last}{why}"
        )
    if twice := [i for i, j in itertools.pairwise(found) if i == j]:
        raise UserError(f"{where}: after {twice[0]} is named twice")
    if not found:
        raise UserError(f"{where}: after names no place")
    return tuple(found)


def _listed(after: Positions, n_layers: int, where: str) -> list[int]:
    if isinstance(after, int):
        return [after]
    if isinstance(after, list):
        return list(after)
    text = after.strip()
    if match := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", text):
        first, stop = int(match[1]), int(match[2]) + 1
        if not first < stop <= n_layers:
            raise UserError(f"{where}: after {text} is no range of places in {n_layers} layers")
        return list(range(first, stop))
    listed = text[1:-1].strip() if re.fullmatch(r"\[.*\]", text) else text
    if re.fullmatch(r"\d{1,9}(\s*,\s*\d{1,9})*", listed):
        return [int(x) for x in listed.split(",")]
    if match := re.fullmatch(r"(uniform|top|middle|blocks):(\d{1,9})", text):
        return _named(match[1], int(match[2]), n_layers, where)
    raise UserError(
        f"{where}: after is {after!r}; write 15..28, a list, uniform:8, top:8, middle:8 or blocks:8"
    )


def _named(name: str, n: int, n_layers: int, where: str) -> list[int]:
    places = n_layers - 1
    if name == "blocks":
        if not n or n_layers % n:
            raise UserError(f"{where}: after blocks:{n} needs a number that divides the {n_layers} layers")
        size = n_layers // n
        return list(range(size - 1, n_layers, size))
    if not 1 <= n <= places:
        raise UserError(
            f"{where}: after {name}:{n} does not fit; {n_layers} layers have {places} places between them"
        )
    if name == "uniform":
        return [(2 * k + 1) * places // (2 * n) for k in range(n)]
    first = places - n if name == "top" else (places - n) // 2
    return list(range(first, first + n))
