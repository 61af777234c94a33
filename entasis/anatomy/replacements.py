"""Measures that replace one layer at a time and look at the loss: one registered function for each way of replacing.

    @replacement("skip", kind="ablation", says="the layer is left out")
    def skip(subject: Subject) -> Callable[[int, Batch], Span | None]: …

The function is called once for a sweep; what it returns is called for each layer of each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from entasis.anatomy.intervals import chance, difference
from entasis.anatomy.measures import Row, measure
from entasis.anatomy.stream import Span, sweep
from entasis.anatomy.subject import Subject
from entasis.anatomy.text import Batch

Prepare = Callable[[Subject], Callable[[int, Batch], Span | None]]


def replacement(name: str, *, kind: str, says: str) -> Callable[[Prepare], Prepare]:
    """Registers the measure `name`: the change in loss, in nats per token, paired over documents."""

    gives = {name: f"change in loss, nats per token, when {says}"}
    if kind == "ablation":
        gives[f"{name}_chance"] = "how much of that a layer of an untrained model shows by chance (5 %)"

    def add(prepare: Prepare) -> Prepare:
        def run(subject: Subject) -> Iterable[Row]:
            nats = sweep(subject, name, prepare(subject))
            found = difference(nats[:-1], nats[-1], subject.text.document_tokens, seed=subject.seed)
            for layer, value in enumerate(found.value):
                if value == value:  # NaN where there is nothing to replace
                    low, high, p = found.low[layer], found.high[layer], found.p[layer]
                    yield Row(name, layer, float(value), "", float(low), float(high), float(p))
            if kind == "ablation":
                control = subject.untrained()
                nats = sweep(control, f"{name}-untrained", prepare(control))
                tokens = sum(len(batch.owner_N) for batch in control.batches())
                yield Row(f"{name}_chance", None, chance((nats[:-1].sum(1) - nats[-1].sum()) / tokens))

        measure(name, kind=kind, gives=gives)(run)
        return prepare

    return add
