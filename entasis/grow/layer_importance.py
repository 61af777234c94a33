"""How much each layer matters to the loss, measured on a few batches of training text while a model is trained.

A measure is one registered function of a model and batches that gives a number for each layer, larger where the layer
matters more. `flops_per_token` is its cost, which a run's budget pays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from entasis.registry import Registry
from entasis.shape import cost, layout
from entasis.shape.shapes import ModelShape

if TYPE_CHECKING:
    import torch

    from entasis.model.transformer import Transformer

Batches = Sequence[tuple["torch.Tensor", "torch.Tensor", "torch.Tensor | None"]]
"""(tokens [B, T], targets [B, T], document ids [B, T] where attention is kept inside a document) of each."""
Measure = Callable[["Transformer", Batches], list[float]]
MEASURES: Registry[Measure] = Registry("importance measure")


@MEASURES.register("gradient")
def measure_gradients(model: Transformer, batches: Batches) -> list[float]:
    """Norm of the gradient of the mean loss by each layer's parameters, all of which are asked, frozen or not."""
    import torch

    layers = [list(block.parameters()) for block in model.blocks]
    asked = [p for parameters in layers for p in parameters]
    learning = {p: p.requires_grad for p in model.parameters()}
    totals = [torch.zeros_like(p, dtype=torch.float32) for p in asked]
    tokens = _count(batches)
    # The loss in chunks makes the gradients of whatever requires one, asked or not.
    for p in learning:
        p.requires_grad_(False)
    for p in asked:
        p.requires_grad_(True)
    try:
        for tokens_BT, targets_BT, ids_BT in batches:
            loss = model.loss(tokens_BT, targets_BT, document_ids_BT=ids_BT) / tokens
            for total, gradient in zip(totals, torch.autograd.grad(loss, asked), strict=True):
                total += gradient
    finally:
        for p, learns in learning.items():
            p.requires_grad_(learns)
    squares = iter([float(total.square().sum()) for total in totals])
    return [sum(next(squares) for _ in parameters) ** 0.5 for parameters in layers]


@MEASURES.register("skip")
def measure_skips(model: Transformer, batches: Batches) -> list[float]:
    """By how many nats per token the loss rises when the layer is left out."""
    import torch

    from entasis.model.attention import attention_mask

    losses = [0.0] * (len(model.blocks) + 1)
    with torch.no_grad():
        for tokens_BT, targets_BT, ids_BT in batches:
            T, device = tokens_BT.shape[1], tokens_BT.device
            rotation, mask_BTS = (
                model.rotation(0, T, device),
                attention_mask(0, T, ids_BT, device, model.attention),
            )
            x_BTD = model.embed(tokens_BT)
            for i in range(len(model.blocks)):
                rest_BTD = model.run_layers(x_BTD, rotation, i + 1, mask_BTS=mask_BTS)
                losses[i] += float(model.head_loss(model.norm(rest_BTD), targets_BT))
                x_BTD = model.run_layers(x_BTD, rotation, i, i + 1, mask_BTS=mask_BTS)
            losses[-1] += float(model.head_loss(model.norm(x_BTD), targets_BT))
    tokens = _count(batches)
    return [(loss - losses[-1]) / tokens for loss in losses[:-1]]


def _count(batches: Batches) -> int:
    return sum(int((targets_BT >= 0).sum()) for _, targets_BT, _ in batches)


def flops_per_token(measure: str, shape: ModelShape, sequence: int) -> float:
    """What a measure computes for each token that it reads."""
    if measure == "gradient":
        learning = [p.name for i in range(shape.n_layers) for p in layout.layer_parameters(shape, i)]
        return cost.stage_flops_per_token(shape, learning, sequence)
    layers = [cost.layer_flops_per_token(shape, i, sequence, training=False) for i in range(shape.n_layers)]
    head = cost.flops_per_token(shape, sequence, training=False) - sum(layers)
    return sum((i + 1) * flops for i, flops in enumerate(layers)) + (shape.n_layers + 1) * head
