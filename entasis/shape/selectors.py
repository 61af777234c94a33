"""Which parameters are meant: one small language over the layout.

    select(shape, "blocks[12:].attention")
    select(shape, ["newest", "final_norm", "head"], newest={3, 4, 5})
    select(shape, ["all", "not embedding"])

A list is a union; terms with `not` are taken away afterwards (from all, where there are only such). A dot intersects:
`blocks[12:].attention.biases`. Positions are those of the model as it stands; negative ones count from the end.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase

from entasis.errors import UserError
from entasis.shape import interfaces, layout
from entasis.shape.layout import Parameter
from entasis.shape.shapes import ModelShape

WORDS: dict[str, tuple[str, Callable[[Parameter], bool]]] = {
    "all": ("every parameter that can learn", lambda p: True),
    "attention": (
        "query, key, value and output matrices with their biases and QK-norms",
        lambda p: p.part == "attention",
    ),
    "ffn": ("the matrices of the FFNs with their biases", lambda p: p.part == "feedforward"),
    "norms": ("the norms in front of or behind attention and FFN", lambda p: p.part == "norms"),
    "final_norm": ("the norm in front of the head", lambda p: p.part == "final_norm"),
    "embedding": ("the token table and learned positions", lambda p: p.part == "embedding"),
    "head": ("the output matrix and its bias; tied, the token table", lambda p: p.part == "head"),
    "biases": ("every bias, those of norms too", lambda p: p.is_bias),
}
"""Word → (what it means, whether a parameter is meant)."""
OTHERS = {
    "newest": "the layers that the last transition added",
    "blocks[12:]": "layers by position, as Python slices",
    "blocks[0,3]": "layers by a list of positions",
    "query, key, value, gate, …": "one role of the layout in every layer",
    "blocks.3.ffn_*": "patterns of names, with * and ?",
}


def select(
    shape: ModelShape, selector: str | Sequence[str], *, newest: Collection[int] = (), where: str = "selector"
) -> list[str]:
    """Names of the parameters that `selector` means, in the model's order.

    `newest` are the positions of the layers that the last transition added. Raises `UserError`, which begins with
    `where`, for a term that means nothing, and for one that means only a frozen table.
    """
    terms = [selector] if isinstance(selector, str) else list(selector)
    if not terms:
        raise UserError(f"{where} is an empty list; nothing would be meant")
    meant: set[str] = set()
    away: set[str] = set()
    for term in terms:
        if term.startswith("not "):
            away.update(_term(shape, term.removeprefix("not ").strip(), newest, where, away=True))
        else:
            meant.update(_term(shape, term.strip(), newest, where))
    if all(term.startswith("not ") for term in terms):
        meant = _term(shape, "all", newest, where)
    chosen = meant - away
    if not chosen:
        raise UserError(f"{where}: {', '.join(terms)} leaves nothing")
    return [p.name for p in layout.parameters(shape) if p.shares is None and p.name in chosen]


def _term(
    shape: ModelShape, term: str, newest: Collection[int], where: str, *, away: bool = False
) -> set[str]:
    """Names meant by one term. A frozen table is meant by none; `not` takes it away without complaint."""
    parameters = layout.parameters(shape)
    tests = [_word(shape, word, newest, where) for word in term.split(".")]
    if all(tests):
        chosen = [p for p in parameters if all(test(p) for test in tests if test)]
    else:
        chosen = [p for p in parameters if fnmatchcase(p.name, term)]
    if not chosen and "newest" in term.split("."):
        raise UserError(f"{where}: {term!r} means nothing; no layer was added before this stage")
    if not shape.interface.learns and (term == "embedding" or any(p.frozen for p in chosen)):
        chosen = [p for p in chosen if not p.frozen]
        if not chosen and not away:
            kind = interfaces.name_of(shape.interface)
            raise UserError(
                f"{where}: {term!r} means the frozen table of interface {kind}, which never learns"
            )
        return {p.name for p in chosen}
    if not chosen:
        known = [*WORDS, "blocks[0:]", *dict.fromkeys(p.role for p in parameters)]
        near = difflib.get_close_matches(term, [*known, *(p.name for p in parameters)], n=1, cutoff=0.0)[0]
        raise UserError(f"{where}: no parameter matches {term!r}; did you mean {near}?")
    return {p.shares or p.name for p in chosen}


def _word(
    shape: ModelShape, word: str, newest: Collection[int], where: str
) -> Callable[[Parameter], bool] | None:
    """Whether a parameter is meant by one word of a term; None for what is no word."""
    if word in WORDS:
        return WORDS[word][1]
    if word == "newest":
        return lambda p: p.layer in newest
    if match := re.fullmatch(r"blocks\[([^\]]*)\]", word):
        positions = _positions(match[1], shape.n_layers, f"{where}: {word}")
        return lambda p: p.layer in positions
    if word in {p.role for p in layout.parameters(shape)}:
        return lambda p: p.role == word
    return None


def _positions(text: str, n: int, where: str) -> set[int]:
    if match := re.fullmatch(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*(?::\s*(-?[1-9]\d*)?\s*)?", text):
        start, stop, step = (None if x is None else int(x) for x in match.groups())
        return set(range(n)[slice(start, stop, step)])
    if not re.fullmatch(r"\s*-?\d+\s*(,\s*-?\d+\s*)*", text):
        raise UserError(f"{where}: write a slice as in blocks[12:], or positions as in blocks[0,3]")
    positions = [int(x) for x in text.split(",")]
    if wrong := [i for i in positions if not -n <= i < n]:
        raise UserError(f"{where}: there is no layer {wrong[0]}; the model's are 0 to {n - 1}")
    return {i % n for i in positions}
