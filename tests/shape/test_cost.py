"""Costs against the built model and torch's own FLOP counter, on random valid shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from entasis.model.transformer import Transformer
from entasis.shape import LayerShape, ModelShape, cost


@st.composite
def layers(draw):
    kv = draw(st.integers(0, 3))
    heads = kv * draw(st.integers(1, 3))
    return LayerShape(heads, kv, draw(st.integers(0 if heads else 1, 40)))


@st.composite
def shapes(draw):
    norm = draw(st.sampled_from(["rmsnorm", "layernorm"]))
    flag = st.booleans()
    return ModelShape(
        d_model=draw(st.integers(2, 24)),
        head_dim=2 * draw(st.integers(1, 6)),
        vocabulary=draw(st.integers(2, 60)),
        layers=tuple(draw(st.lists(layers(), min_size=1, max_size=4))),
        norm=norm,
        norm_bias=norm == "layernorm" and draw(flag),
        norm_placement=draw(st.sampled_from(["pre", "reordered"])),
        qk_norm=draw(st.sampled_from(["none", "head", "full"])),
        ffn=draw(st.sampled_from(["swiglu", "gelu", "gelu_tanh"])),
        tied_embeddings=draw(flag),
        qkv_bias=draw(flag),
        attention_output_bias=draw(flag),
        ffn_bias=draw(flag),
        head_bias=draw(flag),
        positions=draw(st.sampled_from(["rope", "learned"])),
        context=32,
    )


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_parameters_equal_the_built_model_layer_by_layer(shape):
    with torch.device("meta"):
        model = Transformer(shape)
    assert cost.parameters(shape) == sum(p.numel() for p in model.parameters())
    for i, block in enumerate(model.blocks):
        assert cost.layer_parameters(shape, i) == sum(p.numel() for p in block.parameters())
    table = 0 if shape.tied_embeddings else model.embedding.tokens.weight.numel()
    assert cost.parameters_without_input_embedding(shape) == cost.parameters(shape) - table


@settings(max_examples=40, deadline=None)
@given(shapes(), st.integers(2, 16))
def test_flops_equal_torchs_counter_forward_and_backward(shape, length):
    with torch.device("meta"):
        model = Transformer(shape, attention="plain")
        tokens = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        logits = model(tokens)
    assert forward.get_total_flops() == length * cost.flops_per_token(shape, length, training=False)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    total = forward.get_total_flops() + backward.get_total_flops()
    assert total == length * cost.flops_per_token(shape, length)


@settings(max_examples=20, deadline=None)
@given(shapes())
def test_kv_bytes_equal_what_the_cache_allocates(shape):
    from entasis.model.cache import KVCache

    cache = KVCache(shape, 1, 10, dtype=torch.bfloat16, device="cpu")
    assert 10 * cost.kv_bytes_per_token(shape) == sum(x.numel() * x.element_size() for x in cache.layers)


def test_causal_attention_counts_half_the_scores():
    shape = ModelShape(d_model=64, head_dim=16, vocabulary=100, layers=(LayerShape(4, 4, 128),) * 2)
    full, causal = (cost.flops_per_token(shape, 512, attended=a) for a in ("full", "causal"))
    assert full - causal == 3 * 2 * 4 * 256 * 64


def test_training_memory_is_sixteen_bytes_a_parameter():
    shape = ModelShape(d_model=64, head_dim=16, vocabulary=100, layers=(LayerShape(4, 4, 128),))
    model = Transformer(shape)
    torch.nn.init.zeros_(model.head.weight)
    rule = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    rule.step()
    moments = sum(s[k].numel() * 4 for s in rule.state.values() for k in ("exp_avg", "exp_avg_sq"))
    memory = cost.training_memory(shape)
    assert memory.optimizer == moments
    assert memory.weights == memory.gradients == 4 * cost.parameters(shape)


@pytest.mark.parametrize("attended", ["full", "causal"])
def test_layers_and_head_add_up(attended):
    shape = ModelShape(
        d_model=64, head_dim=16, vocabulary=100, layers=(LayerShape(4, 2, 128), LayerShape(2, 1, 8))
    )
    layers = sum(cost.layer_flops_per_token(shape, i, 64, attended=attended) for i in range(2))
    assert cost.flops_per_token(shape, 64, attended=attended) == layers + 3 * 2 * 64 * 100
