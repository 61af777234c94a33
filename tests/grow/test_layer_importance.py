"""Importance of layers, measured on training text."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from entasis.grow import layer_importance
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape.shapes import LayerShape, ModelShape

SHAPE = ModelShape(
    d_model=32,
    head_dim=8,
    vocabulary=64,
    layers=(LayerShape(4, 2, 64), LayerShape(2, 1, 96), LayerShape(4, 4, 32)),
    context=16,
)


@pytest.fixture
def model():
    model = Transformer(SHAPE, attention="plain")
    init_weights(model, 0)
    return model


@pytest.fixture
def batches():
    ids = torch.randint(64, (2, 3, 17), generator=torch.Generator().manual_seed(0))
    return [(ids[i, :, :-1], ids[i, :, 1:], None) for i in range(2)]


def test_gradients_are_those_of_a_plain_backward_pass(model, batches):
    other = copy.deepcopy(model)
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    found = layer_importance.MEASURES["gradient"](model, batches)
    for tokens_BT, targets_BT, _ in batches:
        (other.loss(tokens_BT, targets_BT) / 96).backward()
    for block, norm in zip(other.blocks, found, strict=True):
        assert torch.nn.utils.get_total_norm([p.grad for p in block.parameters()]).item() == pytest.approx(
            norm
        )
    assert [p.requires_grad for p in model.blocks[0].parameters()] == [False] * 9
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_that_does_nothing_costs_nothing_to_skip(model, batches):
    with torch.no_grad():
        model.blocks[1].attention.output.weight.zero_()
        model.blocks[1].feedforward.down.weight.zero_()
        model.blocks[2].feedforward.down.weight *= 30
    first, second, third = layer_importance.MEASURES["skip"](model, batches)
    assert second == pytest.approx(0, abs=1e-6) and abs(third) > abs(first) > 1e-6


@pytest.mark.parametrize("measure", layer_importance.MEASURES)
def test_documents_kept_apart_are_measured_apart(model, batches, measure):
    """Two documents in one row are two rows; positions are relative, so that it does not matter where they stand."""
    (tokens_BT, targets_BT, _), _ = batches
    ids_BT = (torch.arange(16) >= 8).long().expand(3, 16)
    halves = [(tokens_BT[:, at], targets_BT[:, at], None) for at in (slice(8), slice(8, 16))]
    apart = layer_importance.MEASURES[measure](model, halves)
    together = layer_importance.MEASURES[measure](model, [(tokens_BT, targets_BT, ids_BT)])
    close = {"rel": 1e-4, "abs": 1e-6}  # a sum of 200 nats in fp32 is known to 1.5e-5, over 48 tokens
    assert together == pytest.approx(apart, **close)
    assert layer_importance.MEASURES[measure](model, batches[:1]) != pytest.approx(apart, **close)


@pytest.mark.parametrize("measure", layer_importance.MEASURES)
def test_the_price_is_what_torch_counts(model, batches, measure):
    with FlopCounterMode(display=False) as counter:
        layer_importance.MEASURES[measure](model, batches[:1])
    assert counter.get_total_flops() == 3 * 16 * layer_importance.flops_per_token(measure, SHAPE, 16)


def test_nothing_but_layers_is_asked_for_a_gradient(model, batches, monkeypatch):
    """A loss in chunks makes the gradient of a head that requires one, whoever asked for which."""
    asked = []
    loss = model.loss

    def watched(*args, **kwargs):
        asked.append({name for name, p in model.named_parameters() if p.requires_grad})
        return loss(*args, **kwargs)

    monkeypatch.setattr(model, "loss", watched)
    layer_importance.MEASURES["gradient"](model, batches)
    assert asked == [{name for name, _ in model.named_parameters() if name.startswith("blocks")}] * 2
    assert all(p.requires_grad for p in model.parameters())
