"""Every growth operator makes what its rule says, on shapes and on weights."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entasis.errors import UserError
from entasis.grow import positions
from entasis.grow.growth import OPERATORS, read_operator
from entasis.grow.transitions import Init
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape import layout
from entasis.shape.shapes import LayerShape, ModelShape
from tests.grow.test_resize import TOKENS, random_model
from tests.shape.test_cost import shapes

INIT = Init()
SHAPE = ModelShape(d_model=16, head_dim=4, vocabulary=10, layers=(LayerShape(4, 2, 24),) * 6)


def grow(model: Transformer, name: str, init: Init = INIT, **options):
    """(grown model, its plan)."""
    operator = read_operator(name, options, name)
    plan = operator.plan(model.shape)
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    found = list(operator.weights(plan, tensors.__getitem__, init))
    assert len(found) == len(dict(found)), "a tensor came twice"
    assert {n: tuple(x.shape) for n, x in found} == layout.sizes(plan.shape)
    grown = Transformer(plan.shape).double()
    grown.load_state_dict(dict(found), assign=True)
    return grown, plan


def told(plan):
    return [(x.sources, x.operator, x.is_new) for x in plan.layers]


def block(model, i):
    return {n: p.detach() for n, p in model.blocks[i].named_parameters()}


@settings(max_examples=50, deadline=None)
@given(shapes(), st.data())
def test_silent_layers_leave_the_logits_alone_whatever_the_shape(shape, data):
    model = random_model(shape)
    place = data.draw(st.integers(0, shape.n_layers - 1))
    grown, _ = grow(model, "llama_pro", after=[place])
    torch.testing.assert_close(grown(TOKENS), model(TOKENS), rtol=0, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(shapes(), st.data())
def test_the_silent_mean_of_equal_neighbours_too(shape, data):
    shape = replace(shape, layers=(shape.layers[0],) * 3)
    model = random_model(shape)
    grown, _ = grow(model, "zero_average", after=data.draw(st.sampled_from([[0], [1], "uniform:2"])))
    torch.testing.assert_close(grown(TOKENS), model(TOKENS), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "options", "sources"),
    [
        ("duplicate", {"after": "15..16"}, None),
        ("duplicate", {"after": [0, 2]}, "0 0+ 1 2 2+ 3 4 5"),
        ("duplicate", {"sources": [0, 1, 2, 1, 2, 5]}, "0 1 2 1+ 2+ 5"),
        ("solar", {"drop": 1}, "0 1 2 3 4 1+ 2+ 3+ 4+ 5"),
        ("llama_pro", {"after": "blocks:3"}, "0 1 1+ 2 3 3+ 4 5 5+"),
        ("half_step", {"after": "top:2"}, "0 1 2 3 3+ 4 4+ 5"),
        ("stack", {"times": 2}, "0 1 2 3 4 5 0+ 1+ 2+ 3+ 4+ 5+"),
        ("append_last", {"count": 2}, "0 1 2 3 4 5 4+ 5+"),
        ("append_middle", {"count": 2}, "0 1 2 3 2+ 3+ 4 5"),
        ("append_middle", {"count": 3}, "0 1 2 0+ 1+ 2+ 3 4 5"),
        ("average", {"after": "middle:1"}, "0 1 2 2,3+ 3 4 5"),
        ("zero_average", {"after": [4]}, "0 1 2 3 4 4,5+ 5"),
        ("interpolate", {"after": [0], "t": 0.25}, "0 0,1+ 1 2 3 4 5"),
        ("append_random", {"count": 2}, "0 1 2 3 4 5 + +"),
    ],
)
def test_layers_come_from_where_the_rule_says(name, options, sources):
    operator = read_operator(name, options, name)
    if sources is None:
        with pytest.raises(UserError, match="no range of places in 6 layers"):
            operator.plan(SHAPE)
        return
    plan = operator.plan(SHAPE)
    assert " ".join(",".join(map(str, x.sources)) + "+" * x.is_new for x in plan.layers) == sources
    grown, _ = grow(random_model(SHAPE), name, **options)
    assert grown(TOKENS).isfinite().all()


def test_weights_are_what_the_rules_say():
    model = random_model(SHAPE)
    mean, _ = grow(model, "average", after=[1])
    for name, x in block(mean, 2).items():
        torch.testing.assert_close(x, (block(model, 1)[name] + block(model, 2)[name]) / 2)
    near, _ = grow(model, "interpolate", after=[1], t=0.25)
    for name, x in block(near, 2).items():
        torch.testing.assert_close(x, 0.75 * block(model, 1)[name] + 0.25 * block(model, 2)[name])
    half, plan = grow(model, "half_step", after=[1])
    assert [x[2] for x in told(plan)] == [False, False, True, *[False] * 4]
    for i in (1, 2):
        for name, x in block(half, i).items():
            share = 0.5 if name in ("attention.output.weight", "feedforward.down.weight") else 1.0
            torch.testing.assert_close(x, share * block(model, 1)[name])


def test_slerp_keeps_to_the_arc():
    from entasis.grow.operators.means import slerp

    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    torch.testing.assert_close(slerp(a, b, 0.5), 3 * torch.tensor([[0.5**0.5, 0.5**0.5]]))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, -a, 0.25), a / 2)
    model = random_model(SHAPE)
    grown, _ = grow(model, "interpolate", after=[1], method="slerp")
    name = "attention.query.weight"
    assert not torch.equal(block(grown, 2)[name], (block(model, 1)[name] + block(model, 2)[name]) / 2)


def test_fresh_layers_are_those_of_a_new_model_of_that_depth():
    model = random_model(SHAPE)
    grown, plan = grow(
        model, "append_random", Init(seed=7), count=2, layer={"n_heads": 2, "n_kv_heads": 1, "d_ff": 8}
    )
    other = Transformer(plan.shape)
    init_weights(other, 7)
    for i in (6, 7):
        for name, x in block(grown, i).items():
            torch.testing.assert_close(x, block(other, i)[name].double())
    again, _ = grow(model, "append_random", Init(seed=8), count=2)
    assert not torch.equal(again.blocks[6].feedforward.up.weight[:8], grown.blocks[6].feedforward.up.weight)


@pytest.mark.parametrize(
    ("after", "n", "places"),
    [
        ("uniform:8", 32, (1, 5, 9, 13, 17, 21, 25, 29)),
        ("uniform:5", 6, (0, 1, 2, 3, 4)),
        ("top:3", 32, (28, 29, 30)),
        ("middle:3", 8, (2, 3, 4)),
        ("blocks:8", 32, (3, 7, 11, 15, 19, 23, 27, 31)),
        ("3..5", 8, (3, 4, 5)),
        ("5, 1", 8, (1, 5)),
        (3, 8, (3,)),
    ],
)
def test_positions(after, n, places):
    assert positions.resolve(after, n) == places


@pytest.mark.parametrize(
    ("after", "says"),
    [
        ("top:32", "32 layers have 31 places between them"),
        ("blocks:7", "a number that divides the 32 layers"),
        ([31], "they go from 0 to 30 (it needs a layer on either side)"),
        ([40], "after 40 is not a place in 32 layers"),
        ([1, 1], "after 1 is named twice"),
        ([], "names no place"),
        ("everywhere", "after is 'everywhere'; write 15..28"),
        ("9..3", "no range of places"),
        ("uniform:0", "does not fit"),
    ],
)
def test_positions_that_are_not_there_are_refused(after, says):
    with pytest.raises(UserError) as caught:
        positions.resolve(after, 32, between=True)
    assert says in str(caught.value)


def test_what_an_operator_cannot_do_is_refused_by_name():
    unequal = replace(SHAPE, layers=(LayerShape(4, 2, 24), LayerShape(2, 2, 24)))
    with pytest.raises(
        UserError, match="average: layer 0 has 4 heads on 2 KV heads and d_ff 24, layer 1 has 2"
    ):
        read_operator("average", {"after": [0]}, "x").plan(unequal)
    with pytest.raises(UserError, match="grow: solar: drop is 3; 6 layers grow only with less than 3"):
        read_operator("solar", {"drop": 3}, "x").plan(SHAPE)
    with pytest.raises(UserError, match="append_middle: 6 layers are no whole blocks of 4"):
        read_operator("append_middle", {"count": 4}, "x").plan(SHAPE)
    with pytest.raises(UserError, match="did you mean average"):
        read_operator("averge", {"after": [0]}, "x")
    with pytest.raises(UserError, match="x: unknown key t; choose one of after"):
        read_operator("average", {"after": [0], "t": 1}, "x")
    assert all(kind.__doc__ for kind in OPERATORS.values())
