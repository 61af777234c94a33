"""FLOPs of a stage in which only some parameters learn, against torch's own counter."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from entasis.model.transformer import Transformer
from entasis.shape import LayerShape, ModelShape, cost, layout
from entasis.shape.selectors import select
from tests.shape.test_cost import shapes


def measured(shape, learning, length=4):
    """FLOPs per token of forward and backward, with the logits' sum as the loss."""
    model = Transformer(shape, attention="plain")
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p)
        p.requires_grad_(name in learning)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long)).sum().backward()
    return counter.get_total_flops() / length


@settings(max_examples=100, deadline=None)
@given(shapes(), st.data())
def test_any_choice_of_parameters_costs_what_torch_counts(shape, data):
    names = list(layout.sizes(shape))
    learning = data.draw(st.sets(st.sampled_from(names), min_size=1, max_size=5))
    assert cost.stage_flops_per_token(shape, learning, 4) == measured(shape, learning)


@settings(max_examples=30, deadline=None)
@given(shapes(), st.sampled_from(["all", "blocks[-1]", "head", "norms", "not embedding"]))
def test_selected_parts_cost_what_torch_counts(shape, selector):
    try:
        learning = select(shape, selector)
    except ValueError:
        return
    assert cost.stage_flops_per_token(shape, learning, 4) == measured(shape, learning)


def test_training_everything_costs_three_times_forward():
    shape = ModelShape(d_model=32, head_dim=8, vocabulary=50, layers=(LayerShape(4, 2, 64),) * 3)
    for attended in ("full", "causal"):
        assert cost.stage_flops_per_token(
            shape, layout.sizes(shape), 64, attended=attended
        ) == cost.flops_per_token(shape, 64, attended=attended)


def test_three_of_nine_blocks_cost_less():
    shape = ModelShape(d_model=64, head_dim=16, vocabulary=64, layers=(LayerShape(4, 4, 256),) * 9)
    newest = cost.stage_flops_per_token(shape, select(shape, ["blocks[6:]", "final_norm", "head"]), 64)
    assert 0.5 < newest / cost.flops_per_token(shape, 64) < 0.6
