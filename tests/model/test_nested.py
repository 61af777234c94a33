"""Equal initial values carried through nested widths."""

import dataclasses

import torch

from entasis.model.initialisation import STD, init_weights
from entasis.model.transformer import Transformer
from entasis.shape.shapes import LayerShape, ModelShape

WIDE = ModelShape(
    d_model=64, head_dim=16, vocabulary=100, context=32, layers=(LayerShape(4, 2, 96), LayerShape(4, 2, 200))
)
NARROW = dataclasses.replace(WIDE, layers=(LayerShape(2, 1, 40), LayerShape(4, 2, 7)))


def initial(shape, seed=0, nested=True):
    model = Transformer(shape)
    init_weights(model, seed, nested=nested)
    return dict(model.named_parameters())


def test_a_narrow_layer_begins_as_the_first_heads_and_units_of_a_wide_one():
    wide, narrow = initial(WIDE), initial(NARROW)
    for name, x in narrow.items():
        assert torch.equal(x, wide[name][tuple(slice(n) for n in x.shape)]), name
    assert not torch.equal(
        initial(NARROW, nested=False)["blocks.0.feedforward.down.weight"],
        initial(WIDE, nested=False)["blocks.0.feedforward.down.weight"][:, :40],
    )


def test_rows_differ_and_are_normal():
    found = initial(WIDE)
    up = found["blocks.1.feedforward.up.weight"]
    assert len({tuple(row.tolist()) for row in up}) == 200
    assert abs(float(up.std()) / STD - 1) < 0.03 and abs(float(up.mean())) < 5e-4
    assert not torch.equal(up, initial(WIDE, seed=1)["blocks.1.feedforward.up.weight"])
    assert not torch.equal(up, found["blocks.1.feedforward.gate.weight"])
