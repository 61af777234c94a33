"""Measures that replace one layer at a time and look at the loss: one registered function for each way of replacing.

    @replacement("skip", kind="ablation", says="the layer is left out")
    def skip(subject: Subject) -> Callable[[int, Batch], Span | None]: …

The function is called once for a sweep; what it returns is called for each layer of each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from entasis.anatomy.intervals import difference
from entasis.anatomy.measures import Row, measure
from entasis.anatomy.stream import Span, sweep
from entasis.anatomy.subject import Subject
from entasis.anatomy.text import Batch

Prepare = Callable[[Subject], Callable[[int, Batch], Span | None]]


def replacement(name: str, *, kind: str, says: str) -> Callable[[Prepare], Prepare]:
    """Registers the measure `name`: the change in loss, in nats per token, paired over documents."""

    def add(prepare: Prepare) -> Prepare:
        def run(subject: Subject) -> Iterable[Row]:
            nats = sweep(subject, name, prepare(subject))
            found = difference(nats[:-1], nats[-1], subject.text.document_tokens, seed=subject.seed)
            for layer, value in enumerate(found.value):
                if value == value:  # NaN where there is nothing to replace
                    low, high, p = found.low[layer], found.high[layer], found.p[layer]
                    yield Row(name, layer, float(value), "", float(low), float(high), float(p))

        measure(name, kind=kind, gives={name: f"change in loss, nats per token, when {says}"})(run)
        return prepare

    return add
