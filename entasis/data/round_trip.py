"""Ids to text and back: where to cut ids, and how much of them returns."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator

import numpy as np

from entasis.data import tokenizer as tokenizers


def pieces(ids: np.ndarray, end: int | None) -> Iterator[list[int]]:
    """Stretches of up to 512 ids from 16 places, each within a document and from its beginning where one begins."""
    for start in np.linspace(0, max(0, len(ids) - 512), 16).astype(int):
        stretch = ids[start : start + 512].astype(np.int64)
        edges = np.flatnonzero(stretch == end) if end is not None else np.zeros(0, np.int64)
        parts = np.split(stretch, edges + 1)
        if start and len(parts) > 1:
            parts = parts[1:]
        for part in parts:
            inside = part[part != end].tolist() if end is not None else part.tolist()
            if inside:
                yield inside


def lost_bytes(chosen: tokenizers.Tokenizer, text: str, ids: np.ndarray) -> int:
    """UTF-8 bytes of a text that its ids do not give back: of each character that the decoded ids have fewer of.

    What the ids for unknown text stand for is lost. The order of characters, their case, their Unicode form (NFKC) and
    blanks before the text are not compared, so that a tokenizer that normalises text does not lose it.
    """
    kept = ids if chosen.unknown is None else ids[ids != chosen.unknown]
    if (back := chosen.decode(kept)) == text:
        return 0
    wanted = _characters(text)
    readings = [back] if chosen.library.decoder else [back, joined(chosen, kept.tolist())]
    return min(sum(len(c.encode()) * n for c, n in (wanted - _characters(r)).items()) for r in readings)


def _characters(text: str) -> Counter[str]:
    return Counter(unicodedata.normalize("NFKC", text.lstrip(" ")).casefold())


def changes_of_script(letters: str) -> float:
    """How often a letter's script is not that of the one before; those that East Asian texts mix count as one."""
    east = {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC"}
    kinds = {c: unicodedata.name(c, "-").split()[0] for c in set(letters)}
    scripts = np.array(["CJK" if kinds[c] in east else kinds[c] for c in letters])
    return float((scripts[1:] != scripts[:-1]).mean())


def whole_characters(chosen: tokenizers.Tokenizer, ids: list[int]) -> tuple[list[int], str]:
    """The ids and their text, without those at the edges that are parts of a cut character.

    One cut character spoils more than itself: a decoder of byte tokens gives up all that are in one run.
    """
    text = chosen.decode(ids)
    if "\ufffd" not in text:
        return ids, text
    cuts = [(a, b) for a in range(4) for b in range(4)]
    shorter = [(ids[a : len(ids) - b], chosen.decode(ids[a : len(ids) - b])) for a, b in cuts]
    return min(shorter, key=lambda pair: (pair[1].count("\ufffd"), -len(pair[0])))


def joined(chosen: tokenizers.Tokenizer, ids: list[int]) -> str:
    """The tokens without anything between: the library puts blanks there where a tokenizer has no decoder."""
    return "".join(chosen.library.id_to_token(i) or "" for i in ids)


def common(a: list[int], b: list[int]) -> int:
    """The length of the longest common subsequence, so that one token more or less moves nothing after it."""
    if a == b:
        return len(a)
    other = np.array(b, np.int64)
    best = np.zeros(len(b) + 1, np.int64)
    for x in a:
        best[1:] = np.maximum.accumulate(np.maximum(best[1:], best[:-1] + (other == x)))
    return int(best[-1])
