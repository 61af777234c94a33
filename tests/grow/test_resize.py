"""Resized models compute what they should, whatever the shape."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from entasis.errors import UserError
from entasis.grow import growth, operators, resize  # noqa: F401  (operators registers them)
from entasis.grow.resize import Order
from entasis.grow.transitions import Init
from entasis.model.transformer import Transformer
from entasis.shape.shapes import LayerShape, ModelShape
from tests.shape.test_cost import layers as any_layer
from tests.shape.test_cost import shapes

TOKENS = torch.arange(12).view(2, 6) % 2


def random_model(shape: ModelShape) -> Transformer:
    model = Transformer(shape).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.5)
    return model


def resized(model: Transformer, plan: resize.ResizePlan) -> Transformer:
    result = Transformer(plan.shape).double()
    found = dict(resize.apply(plan, {n: p.detach() for n, p in model.named_parameters()}))
    drawn = [n for n, entry in plan.parameters.items() if not entry.sources and entry.fill is None]
    assert list(found) == [n for n, _ in result.named_parameters() if n not in drawn]
    found |= {n: x.double() for n, x in Init().draw(plan.shape, drawn)}
    result.load_state_dict(found, assign=True)
    return result


def widened(layer: LayerShape, groups: int, ratio: int, units: int) -> LayerShape:
    kv = layer.n_kv_heads + groups
    per_group = (layer.n_heads // layer.n_kv_heads if layer.n_heads else 0) + ratio
    heads = kv * per_group
    return LayerShape(heads, kv if heads else 0, layer.d_ff + units)


@settings(max_examples=60, deadline=None)
@given(shapes(), st.data())
def test_zeros_leave_the_logits_alone(shape, data):
    model = random_model(shape)
    grow = st.integers(0, 3)
    new = [widened(x, data.draw(grow), data.draw(grow), data.draw(grow)) for x in shape.layers]
    assume(all(x.n_heads or x.d_ff for x in new))
    wide = resized(model, resize.plan(shape, new))
    torch.testing.assert_close(wide(TOKENS), model(TOKENS), rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(shapes(), st.data())
def test_copies_leave_the_logits_alone_or_are_refused_by_name(shape, data):
    model = random_model(shape)
    grow = st.integers(0, 3)
    new = [widened(x, data.draw(grow), data.draw(grow), data.draw(grow)) for x in shape.layers]
    assume(all(x.n_heads or x.d_ff for x in new))
    try:
        plan = resize.plan(shape, new, new_units="copies")
    except UserError as error:
        assert shape.qk_norm == "full" and "full-width QK-norm" in str(error)
        return
    wide = resized(model, plan)
    torch.testing.assert_close(wide(TOKENS), model(TOKENS), rtol=0, atol=1e-9)
    for layer, block in zip(shape.layers, wide.blocks, strict=True):
        if layer.d_ff and block.feedforward.up.weight.shape[0] > layer.d_ff:
            assert block.feedforward.up.weight[layer.d_ff :].abs().sum() > 0


@settings(max_examples=40, deadline=None)
@given(shapes(), st.data())
def test_cutting_what_was_added_gives_the_model_back_to_the_bit(shape, data):
    model = random_model(shape)
    grow = st.integers(0, 3)
    new = [
        widened(x, data.draw(grow), data.draw(grow), data.draw(grow)) if x.n_heads and x.d_ff else x
        for x in shape.layers
    ]
    assume(shape.qk_norm != "full")  # stretched and shrunk again: equal up to rounding, not to the bit
    wide = resized(model, resize.plan(shape, new))
    back = resized(wide, resize.plan(wide.shape, shape.layers))
    for (name, a), (_, b) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@settings(max_examples=40, deadline=None)
@given(shapes(), st.randoms(use_true_random=False))
def test_another_order_of_units_and_groups_is_the_same_function(shape, random):
    model = random_model(shape)
    orders = {
        i: Order(
            random.sample(range(x.n_kv_heads), x.n_kv_heads),
            [
                random.sample(range(ratio), ratio)
                for ratio in [x.n_heads // max(1, x.n_kv_heads)] * x.n_kv_heads
            ],
            random.sample(range(x.d_ff), x.d_ff),
        )
        for i, x in enumerate(shape.layers)
    }
    other = resized(model, resize.plan(shape, shape.layers, orders=orders))
    torch.testing.assert_close(other(TOKENS), model(TOKENS), rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(shapes(), st.data())
def test_more_groups_of_fewer_heads_leave_the_logits_alone(shape, data):
    """As many query heads or more: those of a group are divided among the copies of its keys and values."""
    model = random_model(shape)
    new = []
    for layer in shape.layers:
        kv = layer.n_kv_heads * data.draw(st.integers(1, 4))
        least = -(-layer.n_heads // kv) if kv else 0
        heads = kv * data.draw(st.integers(least, least + 1))
        new.append(replace(layer, n_heads=heads, n_kv_heads=kv))
    for new_units in ("zeros", "copies"):
        try:
            plan = resize.plan(shape, new, new_units=new_units)
        except UserError as error:
            assert shape.qk_norm == "full" and "full-width QK-norm" in str(error) and new_units == "copies"
            continue
        torch.testing.assert_close(resized(model, plan)(TOKENS), model(TOKENS), rtol=0, atol=1e-9)


def test_divided_groups_that_are_cut_keep_the_first_heads_of_each():
    shape = ModelShape(d_model=8, head_dim=4, vocabulary=10, layers=(LayerShape(6, 2, 6),))
    model, silent = random_model(shape), random_model(shape)
    with torch.no_grad():  # heads 0 and 4 are cut
        silent.blocks[0].attention.output.weight[:, [*range(4), *range(16, 20)]] = 0
    plan = resize.plan(shape, [LayerShape(4, 4, 6)], orders={0: Order([1, 0], [[2, 1, 0], [0, 2, 1]])})
    torch.testing.assert_close(resized(model, plan)(TOKENS), silent(TOKENS), rtol=0, atol=1e-12)


def test_cutting_keeps_the_first_of_the_order():
    shape = ModelShape(d_model=8, head_dim=4, vocabulary=10, layers=(LayerShape(4, 2, 6),))
    model = random_model(shape)
    silent = random_model(shape)
    with torch.no_grad():  # silence what will be cut: group 0 and units 0, 1, 3, 4
        silent.blocks[0].attention.output.weight[:, :8] = 0
        silent.blocks[0].feedforward.down.weight[:, [0, 1, 3, 4]] = 0
    plan = resize.plan(shape, [LayerShape(2, 1, 2)], orders={0: Order([1, 0], None, [5, 2, 0, 1, 3, 4])})
    torch.testing.assert_close(resized(model, plan)(TOKENS), silent(TOKENS), rtol=0, atol=1e-12)


def test_factors_of_layernorm_scaling_go_along_with_layers():
    """As with `duplicate`, which copies the same layers: a norm's 1/sqrt(place) is that of its old place."""
    layers = tuple(LayerShape(2, 1, n) for n in (4, 6, 8))
    shape = ModelShape(d_model=8, head_dim=4, vocabulary=10, layers=layers, norm_scaling=True)
    model = random_model(shape)
    sources = [0, 1, 1, 2]
    plan = resize.plan(shape, [layers[i] for i in sources], sources=sources)
    twin = growth.read_operator("duplicate", {"sources": sources}, "grow").plan(shape)
    a, b = (resized(model, p)(TOKENS) for p in (plan, twin))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    last = plan.parameters["blocks.3.attention_norm.weight"]
    assert last.sources == (("blocks.2.attention_norm.weight", pytest.approx((4 / 3) ** 0.5)),)


def test_cutting_keeps_the_first_heads_of_each_group():
    shape = ModelShape(d_model=8, head_dim=4, vocabulary=10, layers=(LayerShape(4, 2, 6),))
    model, silent = random_model(shape), random_model(shape)
    with torch.no_grad():  # heads 0 and 3 are cut
        silent.blocks[0].attention.output.weight[:, [*range(4), *range(12, 16)]] = 0
    plan = resize.plan(shape, [LayerShape(2, 2, 6)], orders={0: Order(heads=[[1, 0], [0, 1]])})
    torch.testing.assert_close(resized(model, plan)(TOKENS), silent(TOKENS), rtol=0, atol=1e-12)


def test_layers_are_dropped_and_repeated():
    shape = ModelShape(
        d_model=8, head_dim=4, vocabulary=10, layers=tuple(LayerShape(2, 1, n) for n in (4, 6, 8))
    )
    model = random_model(shape)
    plan = resize.plan(shape, [shape.layers[i] for i in (2, 0, 0)], sources=[2, 0, 0])
    other = resized(model, plan)
    assert [(x.sources, x.is_new) for x in plan.layers] == [((2,), False), ((0,), False), ((0,), True)]
    for new, old in enumerate((2, 0, 0)):
        for name, p in other.blocks[new].named_parameters():
            assert torch.equal(p, model.blocks[old].get_parameter(name))
    assert len({p.data_ptr() for p in other.parameters()}) == len(list(other.parameters()))


@settings(max_examples=30, deadline=None)
@given(shapes(), any_layer())
def test_moments_follow_the_same_plan_without_factors(shape, layer):
    """Every place of a moment comes from the same place as its weight; none is scaled."""
    new = [layer if x.n_heads and x.d_ff and layer.n_heads and layer.d_ff else x for x in shape.layers]
    plan = resize.plan(shape, new)
    for entry in plan.parameters.values():
        if entry.source is None:
            continue
        old = torch.arange(1.0, 1.0 + torch.Size(dict(layout_sizes(shape))[entry.source]).numel())
        old = old.view(dict(layout_sizes(shape))[entry.source])
        found = entry.make(old, old, factors=False)
        assert tuple(found.shape) == entry.size
        assert set(found.flatten().tolist()) <= {0.0, *old.flatten().tolist()}


def layout_sizes(shape):
    from entasis.shape import layout

    return layout.sizes(shape)


def test_what_cannot_be_resized_is_refused_by_name():
    shape = ModelShape(
        d_model=8, head_dim=4, vocabulary=10, layers=(LayerShape(2, 2, 4),) * 2, qk_norm="full"
    )
    with pytest.raises(UserError, match="2 layers cannot become 3"):
        resize.plan(shape, [LayerShape(2, 2, 4)] * 3)
    with pytest.raises(UserError, match="no layer 2; the model's are 0 to 1"):
        resize.plan(shape, [LayerShape(2, 2, 4)], sources=[2])
    with pytest.raises(UserError, match="layer 1: its full-width QK-norm"):
        resize.plan(shape, [shape.layers[0], LayerShape(3, 3, 4)], new_units="copies")
    with pytest.raises(UserError, match="layer 0: units are not an order of 0 to 3"):
        resize.plan(shape, shape.layers, orders={0: Order(units=[0, 1, 2])})
    gelu = replace(shape, ffn="gelu")
    assert resize.plan(gelu, [LayerShape(2, 2, 6)] * 2).shape.ffn == "gelu"
