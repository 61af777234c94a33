"""The layout against the built model, on random valid shapes."""

import torch
from hypothesis import given, settings

from entasis.model.transformer import Transformer
from entasis.shape import layout
from tests.shape.test_cost import shapes


@settings(max_examples=100, deadline=None)
@given(shapes())
def test_layout_names_what_the_model_holds_in_its_order(shape):
    with torch.device("meta"):
        model = Transformer(shape)
    assert list(layout.sizes(shape).items()) == [
        (name, tuple(p.shape)) for name, p in model.named_parameters()
    ]


@settings(max_examples=100, deadline=None)
@given(shapes())
def test_axes_say_what_a_parameter_reads_and_writes(shape):
    for p in layout.parameters(shape):
        if p.layer is None:
            continue
        sizes = layout.axis_sizes(shape, shape.layers[p.layer])
        assert p.size == tuple(sizes[axis] for axis in p.axes)
        assert p.is_matrix == (len(p.size) == 2)
        if p.is_matrix:
            # Each projection stands on the residual stream on exactly one side.
            assert (p.axes[0] == "residual") != (p.axes[-1] == "residual")
            assert (p.axes[0] == "residual") == p.name.endswith(("output.weight", "down.weight"))


@settings(max_examples=50, deadline=None)
@given(shapes())
def test_a_tied_head_is_counted_as_shared(shape):
    heads = [p for p in layout.parameters(shape) if p.role == "head" and not p.is_bias]
    assert len(heads) == 1
    assert heads[0].shares == ("embedding.tokens.weight" if shape.tied_embeddings else None)
