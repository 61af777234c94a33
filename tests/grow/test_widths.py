"""Widened, narrowed and reshaped models, by the operators and by the transition `resize`: what they compute and learn."""

import json
from dataclasses import replace

import pytest
import torch

from entasis.errors import UserError
from entasis.grow import transitions
from entasis.grow.operators import widths
from entasis.grow.transitions import Init
from entasis.model.initialisation import draw
from entasis.model.transformer import Transformer
from entasis.shape.shapes import LayerShape, ModelShape
from tests.grow.test_resize import TOKENS, random_model

SHAPE = ModelShape(
    d_model=16,
    head_dim=4,
    vocabulary=10,
    layers=(LayerShape(4, 2, 24), LayerShape(4, 2, 0), LayerShape(0, 0, 24)),
)
BOTH = [LayerShape(4, 2, 24).to_dict()] * 3
EQUAL = replace(SHAPE, layers=(LayerShape(4, 2, 24),) * 2)
WIDE = [LayerShape(8, 4, 48).to_dict()] * 2


def change(model: Transformer, source: dict, seed: int = 0) -> Transformer:
    """The model after a transition, in fp64."""
    transition = transitions.read(source, "here")
    plan = transition.plan(model.shape)
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    plan = transition.settle(plan, tensors.__getitem__, model.shape)
    result = Transformer(plan.shape).double()
    result.load_state_dict(dict(transition.weights(plan, tensors.__getitem__, Init(seed))), assign=True)
    return result.requires_grad_()


def descend(model: Transformer) -> None:
    """One step down the gradient, which is left on the parameters."""
    model.zero_grad()
    model.loss(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad


def both(target: list[dict], **options) -> list[dict]:
    """The same change as an operator and as a transition."""
    return [
        {"grow": {"operator": "reshape", "target": target, **options}},
        {"resize": {"layers": target, **options}},
    ]


@pytest.mark.parametrize(
    "source", [*both(BOTH), {"grow": {"operator": "widen", "d_ff": 24, "n_heads": 4, "n_kv_heads": 2}}]
)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_placement": "reordered", "norm": "layernorm", "norm_bias": True},
        {"qk_norm": "full", "ffn": "gelu", "ffn_bias": True, "qkv_bias": True, "attention_output_bias": True},
    ],
)
def test_a_half_that_a_layer_gains_is_silent_and_learns(source, fields):
    model = random_model(replace(SHAPE, **fields))
    grown = change(model, source, seed=3)
    torch.testing.assert_close(grown(TOKENS), model(TOKENS), rtol=0, atol=1e-9)
    matrices = ["blocks.1.feedforward.up.weight", "blocks.2.attention.query.weight"]
    matrices += ["blocks.2.attention.key.weight", "blocks.2.attention.value.weight"]
    for name, value in draw(grown.shape, matrices, 3):
        assert torch.equal(grown.get_parameter(name), value.double())
    outputs = ["blocks.1.feedforward.down.weight", "blocks.2.attention.output.weight"]
    if "norm_placement" in fields:
        outputs = ["blocks.1.feedforward_norm.weight", "blocks.2.attention_norm.weight"]
    assert not any(grown.get_parameter(name).any() for name in outputs)
    descend(grown)
    assert all(grown.get_parameter(name).grad.abs().max() > 1e-6 for name in outputs)
    descend(grown)  # the outputs have left 0
    assert all(grown.get_parameter(name).grad.abs().max() > 1e-12 for name in matrices)


def test_a_half_of_zeros_stays_zero_for_serving():
    grown = change(
        random_model(SHAPE), {"grow": {"operator": "reshape", "target": BOTH, "new_units": "zeros"}}
    )
    assert not any(p.any() for name, p in grown.blocks[1].feedforward.named_parameters())


@pytest.mark.parametrize("noise", [None, 0])
def test_copies_that_the_transition_makes_learn_different_things(noise):
    model = random_model(EQUAL)
    options = {} if noise is None else {"noise": noise}
    grown = change(model, {"resize": {"layers": WIDE, **options}})
    torch.testing.assert_close(grown(TOKENS), model(TOKENS), rtol=0, atol=1e-9)
    for _ in range(3):
        descend(grown)
    block = grown.blocks[1]
    for x in (block.feedforward.up.weight, block.attention.query.weight, block.attention.value.weight):
        apart = (x[: len(x) // 2] - x[len(x) // 2 :]).abs().max()
        assert apart < 1e-12 if noise == 0 else apart > 1e-6


def test_what_the_transition_only_cuts_or_repeats_stays_to_the_bit():
    model = random_model(EQUAL).float()
    layers = [LayerShape(2, 1, 12), LayerShape(4, 2, 24), LayerShape(4, 2, 24)]
    source = {"resize": {"layers": [x.to_dict() for x in layers], "sources": [0, 1, 1]}}
    grown = change(model, source)
    old, new = model.blocks[0].feedforward.down.weight, grown.blocks[0].feedforward.down.weight
    assert torch.equal(old[:, :12], new)
    assert all(
        torch.equal(p, grown.blocks[2].get_parameter(n)) for n, p in model.blocks[1].named_parameters()
    )


@pytest.mark.parametrize(
    "source",
    [
        {"grow": {"operator": "widen", "n_kv_heads": 4}},
        {"grow": {"operator": "reshape", "n_kv_heads": 4, "new_units": "zeros"}},
        {"resize": {"layers": [LayerShape(4, 4, 24).to_dict()] * 2}},
    ],
)
def test_more_kv_heads_keep_every_query_head(source):
    model = random_model(EQUAL)
    transition = transitions.read(source, "here")
    grown = change(model, source)
    torch.testing.assert_close(grown(TOKENS), model(TOKENS), rtol=0, atol=1e-9)
    if "grow" in source:
        assert transition.computes_the_same(EQUAL)
    rows = (x.blocks[0].attention.query.weight.view(4, 4, 16) for x in (model, grown))
    assert len({json.dumps(head.tolist()) for x in rows for head in x}) == 4


@pytest.mark.parametrize(
    ("operator", "options", "says"),
    [
        ("widen", {"n_heads": 8}, "layer 2: n_heads is 8 and n_kv_heads is 0; both are 0"),
        ("widen", {"n_kv_heads": 0}, "layer 0: n_heads is 4 and n_kv_heads is 0; both are 0"),
        ("narrow", {"n_heads": 0}, "layer 0: n_heads is 0 and n_kv_heads is 2; both are 0"),
        ("narrow", {"d_ff": -1}, "layer 0: d_ff is -1; it must be a whole number"),
        ("reshape", {"d_ff": 0}, "layer 2: n_heads and d_ff are both 0"),
        (
            "widen",
            {"target": [{"n_heads": "two", "n_kv_heads": 1, "d_ff": 8}] * 3},
            "n_heads is 'two'; it must be",
        ),
        ("widen", {"n_heads": 2, "n_kv_heads": 2}, "layer 0: target is narrower than the layer"),
        ("narrow", {"target": [LayerShape(2, 2, 8).to_dict(), *BOTH[:2]]}, "layer 1: target is wider"),
        ("narrow", {"target": [LayerShape(4, 1, 8).to_dict(), *BOTH[:2]]}, "layer 0: target is wider"),
        ("narrow", {"target": [LayerShape(4, 4, 8).to_dict(), *BOTH[:2]]}, "layer 0: target is wider"),
    ],
)
def test_widths_that_cannot_be_are_refused_by_name(operator, options, says):
    with pytest.raises(UserError, match=says) as caught:
        transitions.read({"grow": {"operator": operator, **options}}, "here").plan(SHAPE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", both(WIDE))
def test_copies_in_a_silent_layer_part_too(source, dtype):
    """As after `llama_pro`: shares of zeros are random numbers that cancel."""
    model = random_model(EQUAL).to(dtype)
    with torch.no_grad():
        model.blocks[1].feedforward.down.weight.zero_()
    transition = transitions.read(source, "here")
    plan = transition.plan(EQUAL)
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    found = dict(transition.weights(plan, tensors.__getitem__, Init()))
    down = found["blocks.1.feedforward.down.weight"]
    first, second = down[:, :24], down[:, 24:]
    torch.testing.assert_close(first, -second, rtol=0, atol=1e-8)
    assert 0.003 < first.float().std() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_worked_on_at_a_time_change_nothing(dtype, monkeypatch):
    def widened():
        model = random_model(EQUAL).to(dtype)
        transition = transitions.read({"grow": {"operator": "widen", "d_ff": 48}}, "here")
        tensors = {n: p.detach() for n, p in model.named_parameters()}
        return dict(transition.weights(transition.plan(EQUAL), tensors.__getitem__, Init()))

    whole = widened()
    monkeypatch.setattr(widths, "_ROWS", 5)
    for name, found in widened().items():
        # The deviation of a column is known to the rounding of its sum.
        scale = 1e-6 * whole[name].abs().max().item() if dtype == torch.float32 else 0
        torch.testing.assert_close(found, whole[name], rtol=0, atol=scale)
