"""Families of Hugging Face checkpoints with LayerNorm and GELU: StarCoder 2 and GPT-2."""

from __future__ import annotations

from dataclasses import replace

from entasis.interop import rope
from entasis.interop.config_reader import ConfigReader, Description, read_context, read_layer_count
from entasis.interop.hf_families import LLAMA, expect, family, refuse_sliding_window
from entasis.interop.name_map import NameMap
from entasis.shape.shapes import LayerShape, ModelShape

STARCODER2 = replace(
    LLAMA,
    block={
        **{ours: theirs for ours, theirs in LLAMA.block.items() if not theirs.startswith("mlp.")},
        "feedforward.up": "mlp.c_fc",
        "feedforward.down": "mlp.c_proj",
    },
)
GPT2 = NameMap(
    outer={
        "embedding.tokens": "transformer.wte",
        "embedding.positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    layer="transformer.h.{i}",
    block={
        "attention_norm": "ln_1",
        "attention.query": "attn.c_attn",
        "attention.key": "attn.c_attn",
        "attention.value": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "feedforward_norm": "ln_2",
        "feedforward.up": "mlp.c_fc",
        "feedforward.down": "mlp.c_proj",
    },
    conv1d=True,
    # Checkpoints from before transformers 4 hold the causal mask.
    ignored=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
    optional="transformer.",  # OpenAI's own four leave it out
)
_GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu"}


@family("starcoder2", names=STARCODER2, model_types=("starcoder2",), architectures=("Starcoder2ForCausalLM",))
def read_starcoder2(
    config: ConfigReader, n_tensors: int, layers: list[LayerShape] | None = None
) -> Description:
    """StarCoder 2: LayerNorm, GELU, rotary positions, and one switch for the biases of all matrices but the head's."""
    d_model, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if layers is None:
        same = LayerShape(
            n_heads, config.integer("num_key_value_heads", 2), config.integer("intermediate_size", 12_288)
        )
        layers = [same] * read_layer_count(config, "num_hidden_layers", n_tensors)
    length, bias = read_context(config, "max_position_embeddings", 4096), config.flag("use_bias", True)
    refuse_sliding_window(config, length, always=True)
    shape = ModelShape(
        d_model=d_model,
        head_dim=config.integer("head_dim", d_model // n_heads if n_heads else 0),
        vocabulary=config.integer("vocab_size"),
        layers=tuple(layers),
        norm="layernorm",
        norm_bias=True,
        norm_eps=config.number("norm_epsilon", 1e-5, least=0, most=1),
        ffn=expect(config, "hidden_act", "gelu_pytorch_tanh", _GELU),
        tied_embeddings=config.flag("tie_word_embeddings", True),
        qkv_bias=bias,
        attention_output_bias=bias,
        ffn_bias=bias,
        head_bias=config.flag("head_bias", False),  # of our own folders with a modeling file
        context=length,
        **rope.read_config(config),
    )
    return Description(shape)


@family("gpt2", names=GPT2, model_types=("gpt2",), architectures=("GPT2LMHeadModel",))
def read_gpt2(config: ConfigReader, n_tensors: int) -> Description:
    """GPT-2: learned positions, LayerNorm, biases everywhere, fused qkv, weights stored [in, out]."""
    d_model, n_heads = config.integer("n_embd"), config.integer("n_head")
    if n_heads == 0 or d_model % n_heads:
        raise config.wrong("n_head", n_heads, f"a divisor of n_embd {d_model}")
    layer = LayerShape(n_heads, n_heads, config.integer("n_inner", 4 * d_model))
    shape = ModelShape(
        d_model=d_model,
        head_dim=d_model // n_heads,
        vocabulary=config.integer("vocab_size"),
        layers=(layer,) * read_layer_count(config, "n_layer", n_tensors),
        norm="layernorm",
        norm_bias=True,
        norm_eps=config.number("layer_norm_epsilon", 1e-5, least=0, most=1),
        ffn=expect(config, "activation_function", "gelu_new", _GELU),
        tied_embeddings=config.flag("tie_word_embeddings", True),
        qkv_bias=True,
        attention_output_bias=True,
        ffn_bias=True,
        positions="learned",
        context=read_context(config, "n_positions", 1024),
        attention_scale=None if config.flag("scale_attn_weights", True) else 1.0,
    )
    return Description(shape)
