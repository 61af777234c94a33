"""A kind of FFN that only this file knows: both halves registered here, no other file touched."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from entasis.errors import UserError
from entasis.model import feedforward
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape import LayerShape, ModelShape, activations, cost, ffn_kinds, layout
from entasis.shape.ffn_kinds import FFNKind


class LowRank(nn.Module):
    """down(relu(expand(reduce x)))."""

    def __init__(self, shape, layer):
        super().__init__()
        rank = dict(layer.ffn.numbers)["rank"]
        self.reduce = nn.Linear(shape.d_model, rank, bias=shape.ffn_bias)
        self.expand = nn.Linear(rank, layer.d_ff, bias=shape.ffn_bias)
        self.down = nn.Linear(layer.d_ff, shape.d_model, bias=shape.ffn_bias)

    def forward(self, x_BTD):
        return self.down(self.expand(self.reduce(x_BTD)).relu())


@pytest.fixture(autouse=True)
def kind():
    ffn_kinds.register(
        FFNKind(
            "low_rank_relu",
            matrices=(
                ("reduce", ("rank", "residual")),
                ("expand", ("ffn", "rank")),
                ("down", ("residual", "ffn")),
            ),
            kept=lambda sizes: sizes["rank"] + sizes["ffn"],  # relu's result is what down reads
            numbers=("rank",),
        )
    )
    feedforward.FEEDFORWARDS.register("low_rank_relu")(LowRank)
    yield
    del ffn_kinds.KINDS["low_rank_relu"], feedforward.FEEDFORWARDS["low_rank_relu"]
    layout._layer_entries.cache_clear()


def shape(**fields):
    odd = {"n_heads": 2, "n_kv_heads": 1, "d_ff": 24, "ffn": {"kind": "low_rank_relu", "rank": 6}}
    plain = {"n_heads": 2, "n_kv_heads": 1, "d_ff": 32}
    return ModelShape.from_dict(
        {"d_model": 16, "head_dim": 8, "vocabulary": 40, "layers": [plain, odd, plain], **fields}
    )


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_read_costed_and_built(bias):
    drawn = shape(ffn_bias=bias)
    assert ModelShape.from_dict(drawn.to_dict()) == drawn
    assert "ffn" not in drawn.to_dict()["layers"][0]
    model = Transformer(drawn, attention="plain")
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == layout.sizes(drawn)
    assert cost.parameters(drawn) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 8, dtype=torch.long))
    assert counter.get_total_flops() == 8 * cost.flops_per_token(drawn, 8, training=False)


def test_what_it_keeps_for_the_backward_pass_is_what_torch_keeps():
    drawn = shape()
    block = Transformer(drawn).blocks[1]
    x_BTD, seen = torch.randn(1, 8, 16, requires_grad=True), {}

    def pack(tensor):
        if not any(tensor.data_ptr() == p.data_ptr() for p in block.parameters()):
            seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block.feedforward(x_BTD)
    own = activations.layer_bytes_per_token(drawn, 1, 8, precision="fp32")
    without = activations.layer_bytes_per_token(
        replace(drawn, layers=(replace(drawn.layers[1], d_ff=0, ffn=None),)), 0, 8, precision="fp32"
    )
    norm = 8 * 16 + 4
    assert sum(seen.values()) == 8 * (own - without - norm)


def test_it_trains():
    model = Transformer(shape())
    init_weights(model, 0)
    tokens_BT = torch.randint(40, (4, 9), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert model.blocks[1].feedforward.reduce.weight.grad.abs().sum() > 0


def test_its_numbers_are_checked_by_name():
    layer = {"n_heads": 0, "n_kv_heads": 0, "d_ff": 8}
    for ffn, message in (
        ({"kind": "low_rank_relu"}, "layer 0: ffn has no numbers; low_rank_relu takes rank"),
        ({"kind": "low_rank_relu", "rank": 0}, "layer 0: ffn.rank is 0"),
        ({"kind": "low"}, "layer 0: ffn.kind is 'low'; choose one of swiglu"),
        ("low_rank_relu", "write {kind: NAME}"),
    ):
        with pytest.raises(UserError, match=message):
            shape(layers=[{**layer, "ffn": ffn}])
    with pytest.raises(UserError, match="has numbers of its own; name it in a layer"):
        shape(ffn="low_rank_relu")


def test_a_kind_without_a_module_is_refused_when_built():
    del feedforward.FEEDFORWARDS["low_rank_relu"]
    with pytest.raises(UserError, match="ffn kind 'low_rank_relu' is not known"):
        Transformer(shape())
    feedforward.FEEDFORWARDS.register("low_rank_relu")(LowRank)


def test_equal_layers_with_another_kind_are_other_layers():
    assert not shape().uniform and shape().distinct_layers == 2
    assert LayerShape(2, 1, 8) == LayerShape(2, 1, 8, None)
