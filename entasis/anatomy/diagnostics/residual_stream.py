"""The residual stream: how much each layer changes it, in which direction, and what the head reads in it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch.nn.functional as F

from entasis.anatomy.intervals import loss_change
from entasis.anatomy.layer_sweep import score_documents, walk_layers
from entasis.anatomy.measures import Row, measure
from entasis.anatomy.subject import Subject


@measure(
    "stream",
    kind="structure",
    gives={
        "stream_norm": "mean norm of the residual stream behind the layer",
        "update_ratio": "mean norm of the layer's update / norm of the stream in front of it",
        "block_influence": "1 − mean cosine of the stream in front of and behind the layer (2403.03853)",
        "angular_distance": "arccos of that cosine at the last token of each window / π (2403.17887)",
    },
)
def stream(subject: Subject) -> Iterable[Row]:
    sums_LQ = np.zeros((subject.n_layers, 4))
    tokens = windows = 0
    for batch in subject.batches():
        tokens += batch.tokens_BT.numel()
        windows += len(batch.tokens_BT)
        for layer, x_BTD, y_BTD in walk_layers(subject, batch):
            x, y = x_BTD.double(), y_BTD.double()
            cosine_BT = F.cosine_similarity(x, y, dim=-1).clamp(-1, 1)
            in_front_BT = x.norm(dim=-1)
            sums_LQ[layer] += [
                float(y.norm(dim=-1).sum()),
                float(((y - x).norm(dim=-1) / in_front_BT.clamp_min(1e-300)).sum()),
                float((1 - cosine_BT).sum()),
                float(cosine_BT[:, -1].acos().sum() / math.pi),
            ]
    for layer, (norm, update, influence, angle) in enumerate(sums_LQ):
        yield Row("stream_norm", layer, norm / tokens)
        yield Row("update_ratio", layer, update / tokens)
        yield Row("block_influence", layer, influence / tokens)
        yield Row("angular_distance", layer, angle / windows)


@measure(
    "logit_lens",
    kind="structure",
    gives={"logit_lens": "loss of the model stopped behind the layer, nats per token"},
)
def logit_lens(subject: Subject) -> Iterable[Row]:
    """The final norm and the head read the stream early; the last layer's value is the model's loss."""
    nats_LN = np.zeros((subject.n_layers, len(subject.text.names)))
    for batch in subject.batches():
        for layer, _, y_BTD in walk_layers(subject, batch):
            nats_LN[layer] += score_documents(subject, y_BTD, batch)
    found = loss_change(nats_LN, np.zeros(nats_LN.shape[1]), subject.text.document_tokens, seed=subject.seed)
    for layer in range(subject.n_layers):
        yield found.row(layer, "logit_lens", layer)
