"""The model as it is: what every change is measured against."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from entasis.anatomy.intervals import difference
from entasis.anatomy.measures import Row, measure
from entasis.anatomy.stream import clean_nll
from entasis.anatomy.subject import Subject


@measure(
    "loss",
    kind="loss",
    gives={
        "loss": "of the whole model, nats per token",
        "bits_per_byte": "of the whole model, over the text's UTF-8 bytes",
    },
)
def loss(subject: Subject) -> Iterable[Row]:
    nats = clean_nll(subject)
    for quantity, per, scale in (
        ("loss", subject.text.document_tokens, 1.0),
        ("bits_per_byte", subject.text.document_bytes, math.log(2)),
    ):
        found = difference(nats[None] / scale, np.zeros_like(nats), per, seed=subject.seed)
        yield Row(quantity, None, float(found.value[0]), "", float(found.low[0]), float(found.high[0]))
