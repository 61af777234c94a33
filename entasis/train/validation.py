"""What a validation found: the score of each held-out corpus, and of all their documents together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from entasis.evaluate.bits_per_byte import Score, join


class Validation:
    """The scores of one validation by the names of the corpora, at least one."""

    def __init__(self, scores: Mapping[str, Score]) -> None:
        self.scores = dict(scores)

    @cached_property
    def overall(self) -> Score:
        """The score of all documents of all corpora."""
        return join(list(self.scores.values()))

    @property
    def each(self) -> dict[str, Score]:
        """The score of each corpus; empty where there is but one."""
        return self.scores if len(self.scores) > 1 else {}

    def event(self) -> dict[str, Any]:
        """What a reporter is told of it; `nll` is the mean in nats per token."""
        return {
            "bits_per_byte": self.overall.bits_per_byte,
            "nll": self.overall.nll_sum / self.overall.tokens,
            "by_corpus": {name: score.bits_per_byte for name, score in self.each.items()},
        }

    def metrics(self) -> dict[str, float]:
        """What a record of `metrics.jsonl` says of it."""
        name = "validation_bits_per_byte"
        each = {f"{name}/{corpus}": score.bits_per_byte for corpus, score in self.each.items()}
        return {name: self.overall.bits_per_byte, **each}

    def result(self) -> dict[str, Any]:
        """What `result.json` says of it."""
        each = {name: _told(score) for name, score in self.each.items()}
        return {**_told(self.overall), **({"by_corpus": each} if each else {})}


def _told(score: Score) -> dict[str, Any]:
    return {
        "bits_per_byte": score.bits_per_byte,
        "nll": score.nll_sum,
        "bytes": score.bytes,
        "tokens": score.tokens,
        "documents": len(score.document_nll),
        "perplexity": score.perplexity,
    }
