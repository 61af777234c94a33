"""Transitions that are no growth."""

import pytest
import torch

from entasis.errors import UserError
from entasis.grow import transitions
from entasis.grow.transitions import Init
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape.shapes import LayerShape, ModelShape

SHAPE = ModelShape(d_model=16, head_dim=8, vocabulary=32, layers=(LayerShape(2, 1, 24),) * 3, context=8)


def test_the_matrices_of_the_named_layers_are_scaled_and_nothing_else():
    model = Transformer(SHAPE)
    init_weights(model, 0)
    old = {name: p.detach() for name, p in model.named_parameters()}
    change = transitions.read({"scale": {"layers": [0, 2], "factor": 0.9}}, "here")
    plan = change.plan(SHAPE)
    new = dict(change.weights(plan, old.__getitem__, Init()))
    assert plan.shape == SHAPE and not any(layer.is_new for layer in plan.layers)
    for name, x in old.items():
        scaled = name.startswith(("blocks.0", "blocks.2")) and x.ndim == 2
        torch.testing.assert_close(new[name], x * 0.9 if scaled else x, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"layers": [3]}, "no layer 3"), ({"layers": [0], "factor": 0}, "factor"), ({"layers": []}, "layers")],
)
def test_mistakes_are_named(options, says):
    with pytest.raises(UserError, match=says):
        transitions.read({"scale": options}, "here").plan(SHAPE)
