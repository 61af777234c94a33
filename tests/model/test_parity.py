"""Logits of uniform models against transformers' own classes, weights carried over by name."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from entasis.model.transformer import Transformer
from entasis.shape import LayerShape, ModelShape

SIZE = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10_000.0,
}
NAMES = {
    "model.embed_tokens": "embedding.tokens",
    "model.norm": "norm",
    "lm_head": "head",
    "model.layers": "blocks",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
    "mlp.gate_proj": "feedforward.gate",
    "mlp.up_proj": "feedforward.up",
    "mlp.down_proj": "feedforward.down",
    "post_feedforward_layernorm": "feedforward_norm",
}


def shape(**changes):
    return ModelShape(
        **{
            "d_model": 48,
            "head_dim": 8,
            "vocabulary": 211,
            "layers": (LayerShape(6, 2, 96),) * 3,
            "context": 64,
            **changes,
        }
    )


def carried(model, ours, norms):
    state = {}
    for name, value in model.state_dict().items():
        for theirs, mine in {**NAMES, **norms}.items():
            name = name.replace(theirs, mine)
        state[name] = value
    ours.load_state_dict(state)
    return ours


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "olmo2"])
def test_logits_equal_transformers(kind, attention):
    torch.manual_seed(0)
    pre = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feedforward_norm"}
    if kind == "llama":
        theirs = LlamaForCausalLM(LlamaConfig(**SIZE, rms_norm_eps=1e-5))
        ours, norms = Transformer(shape(), attention=attention), pre
    elif kind == "qwen3":
        theirs = Qwen3ForCausalLM(Qwen3Config(**SIZE, head_dim=8, rms_norm_eps=1e-6))
        ours, norms = Transformer(shape(qk_norm="head", norm_eps=1e-6), attention=attention), pre
    else:
        theirs = Olmo2ForCausalLM(Olmo2Config(**SIZE, rms_norm_eps=1e-5))
        ours = Transformer(shape(qk_norm="full", norm_placement="reordered"), attention=attention)
        norms = {"post_attention_layernorm": "attention_norm"}
    with torch.no_grad():
        for p in theirs.parameters():  # norms away from 1, so that a misplaced one shows
            p.add_(0.05 * torch.randn_like(p))
    ours = carried(theirs, ours, norms)
    tokens_BT = torch.randint(0, 211, (2, 40))
    with torch.no_grad():
        expected, found = theirs(tokens_BT).logits, ours(tokens_BT)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_gpt2_logits_equal_transformers():
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=211, n_positions=64, n_embd=48, n_layer=2, n_head=6)
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
    ours = Transformer(
        shape(
            layers=(LayerShape(6, 6, 192),) * 2,
            norm="layernorm",
            norm_bias=True,
            ffn="gelu_tanh",
            tied_embeddings=True,
            qkv_bias=True,
            attention_output_bias=True,
            ffn_bias=True,
            positions="learned",
        )
    )
    state, theirs_state = {}, theirs.transformer.state_dict()
    for name, value in theirs_state.items():
        name = name.replace("h.", "blocks.", 1) if name.startswith("h.") else name
        name = (
            name.replace("wte", "embedding.tokens")
            .replace("wpe", "embedding.positions")
            .replace("ln_f", "norm")
        )
        name = name.replace("ln_1", "attention_norm").replace("ln_2", "feedforward_norm")
        name = name.replace("mlp.c_fc", "feedforward.up").replace("mlp.c_proj", "feedforward.down")
        name = name.replace("attn.c_proj", "attention.output")
        value = value.T if value.ndim == 2 and "embedding" not in name else value
        if "attn.c_attn" in name:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[name.replace("attn.c_attn", f"attention.{part}")] = piece
        else:
            state[name] = value
    ours.load_state_dict(state)
    tokens_BT = torch.randint(0, 211, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens_BT), theirs(tokens_BT).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
)
def test_scaled_rotary_positions_equal_transformers(scaling):
    torch.manual_seed(0)
    size = {k: v for k, v in SIZE.items() if k != "rope_theta"}
    config = LlamaConfig(**size, rope_parameters={"rope_theta": 10_000.0, **scaling})
    theirs = LlamaForCausalLM(config)
    ours = Transformer(shape(rope_scaling=scaling, norm_eps=config.rms_norm_eps))
    ours = carried(
        theirs, ours, {"input_layernorm": "attention_norm", "post_attention_layernorm": "feedforward_norm"}
    )
    tokens_BT = torch.randint(0, 211, (1, 60))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens_BT), theirs(tokens_BT).logits, atol=1e-4, rtol=0)
