"""Recovery speed: one layer is given noise and trained alone; the steps until it has recovered are counted.

Every matrix of the layer gets Gaussian noise of half its norm. AdamW then trains this layer alone on the even windows of
the text; the loss is measured on odd ones. The layer has recovered when 90 % of the rise in loss is undone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

from entasis.anatomy.diagnostics.manipulation import noise_like
from entasis.anatomy.layer_weights import only_trainable
from entasis.anatomy.measures import Row, measure
from entasis.anatomy.subject import Subject
from entasis.errors import UserError
from entasis.model.rotary import Rotation
from entasis.train.optimizers import update

NOISE = 0.5
RECOVERED = 0.9
LEARNING_RATE = 1e-3
STEPS = 100
EVERY = 5
"""Steps between two evaluations, so the resolution of the count."""
WINDOWS = 4
"""Windows in one step of training."""
HELD = 8
"""Windows that the loss is measured on."""
SEEDS = 3
SMALLEST_GAP = 0.001
"""Nats per token: a layer whose noise costs less has nothing to recover."""


@measure(
    "recovery",
    kind="recovery",
    gives={
        "recovery_steps": f"steps until {RECOVERED:.0%} of the loss that the noise costs is won back, mean over {SEEDS} "
        f"seeds, from the fastest to the slowest; 0: the noise cost less than {SMALLEST_GAP} nats, "
        f"{STEPS}: not within {STEPS} steps",
        "recovery_gap": "loss that the noise costs before training, nats per token, mean over seeds",
    },
)
def recovery(subject: Subject) -> Iterable[Row]:
    windows = _windows(subject)
    train, held = windows[0::2], windows[1::2][:HELD]
    if len(held) < 1:
        raise UserError(
            f"recovery: the text has {len(windows)} windows of {subject.text.sequence} tokens; it needs two or more: "
            "give more --tokens or a shorter --sequence"
        )
    model = subject.model
    with only_trainable(model, []):
        with torch.no_grad():
            streams = [model.embed(tokens_BT) for tokens_BT, _ in (_pack(train), _pack(held))]
        rotation = model.rotation(0, subject.text.sequence, subject.device)
        for layer in range(subject.n_layers):
            if layer in subject.chosen:
                found = []
                for seed in range(SEEDS):
                    subject.progress(subject.chosen.index(layer) * SEEDS + seed, len(subject.chosen) * SEEDS)
                    found.append(_recover(subject, layer, seed, streams, (train, held), rotation))
                steps, gaps = zip(*found, strict=True)
                mean = sum(steps) / SEEDS
                yield Row("recovery_steps", layer, mean, "", float(min(steps)), float(max(steps)))
                yield Row("recovery_gap", layer, sum(gaps) / SEEDS, "", min(gaps), max(gaps))
            with torch.no_grad(), subject.autocast():
                streams = [model.run_layers(x_BTD, rotation, layer, layer + 1) for x_BTD in streams]
    subject.progress(1, 1)


Window = tuple[torch.Tensor, torch.Tensor]
"""Tokens and targets [T]."""


def _windows(subject: Subject) -> list[Window]:
    """The text's windows of full length, at most as many as the training can use once."""
    result: list[Window] = []
    for batch in subject.batches():
        if batch.tokens_BT.shape[1] == subject.text.sequence and len(result) < 2 * WINDOWS * STEPS:
            result += zip(batch.tokens_BT, batch.targets_BT, strict=True)
    return result


def _pack(windows: list[Window]) -> Window:
    return torch.stack([t for t, _ in windows]), torch.stack([t for _, t in windows])


def _recover(
    subject: Subject,
    layer: int,
    seed: int,
    streams: list[torch.Tensor],
    windows: tuple[list[Window], list[Window]],
    rotation: Rotation | None,
) -> tuple[int, float]:
    """(steps, gap in nats per token) of one layer under one seed; `streams` are those in front of it."""
    (train_BTD, held_BTD), (train, held) = streams, windows
    targets_BT, held_targets_BT = _pack(train)[1], _pack(held)[1]
    block = copy.deepcopy(subject.model.blocks[layer])

    @torch.no_grad()
    def held_loss() -> float:
        return float(_loss(subject, block, layer, held_BTD, held_targets_BT, rotation))

    clean = held_loss()
    for name, p in block.named_parameters():
        if p.ndim == 2:
            p.data += NOISE * noise_like(p.data, subject.generator("recovery", layer, seed, name))
    block.requires_grad_(True)
    gap = held_loss() - clean
    if gap < SMALLEST_GAP:
        return 0, gap
    optimizer = torch.optim.AdamW(block.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    generator = subject.generator("recovery order", layer, seed)
    for step in range(1, STEPS + 1):
        chosen = torch.randint(len(train), (min(WINDOWS, len(train)),), generator=generator)
        _loss(subject, block, layer, train_BTD[chosen], targets_BT[chosen], rotation).backward()
        update(block.parameters(), [optimizer], max_grad_norm=1.0)
        if step % EVERY == 0:
            left = held_loss() - clean
            if left <= (1 - RECOVERED) * gap:
                return step, gap
    return STEPS, gap


def _loss(
    subject: Subject,
    block: nn.Module,
    layer: int,
    x_BTD: torch.Tensor,
    targets_BT: torch.Tensor,
    rotation: Rotation | None,
) -> torch.Tensor:
    """Nats per token with `block` in place of the layer; `x_BTD` is the stream in front of it."""
    with subject.autocast():
        nll = subject.model.loss_from(block(x_BTD, rotation), layer + 1, targets_BT)
        return nll / (targets_BT != -100).sum()
