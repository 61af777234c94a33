"""The loss of the unchanged model, which every change is compared with."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from entasis.anatomy.intervals import loss_change
from entasis.anatomy.layer_sweep import score_model
from entasis.anatomy.measures import Row, measure
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
    nats = score_model(subject)
    for quantity, per, scale in (
        ("loss", subject.text.document_tokens, 1.0),
        ("bits_per_byte", subject.text.document_bytes, math.log(2)),
    ):
        found = loss_change(nats[None] / scale, np.zeros_like(nats), per, seed=subject.seed)
        yield found.row(0, quantity, None)
