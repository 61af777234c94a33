"""The families of Hugging Face checkpoints: their tensor names, and what `config.json` says of the model.

One registered function a family reads its config; export writes by the same names. Defaults are those of transformers' configuration classes, because a key
that equals its default may be left out of a config.json. What a family's modeling code could do but our
models do not is refused by name: a model that loads and computes something else is the worst outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from entasis.interop import rope
from entasis.interop.config_reader import (
    ConfigReader,
    Description,
    note_skipped,
    read_context,
    read_layer_count,
)
from entasis.interop.name_map import NameMap
from entasis.registry import Registry
from entasis.shape.shapes import LayerShape, ModelShape

Reader = Callable[..., Description]
"""Given the config, the number of tensors of the checkpoint, which bounds its layers, and maybe the layers."""


@dataclass(frozen=True)
class Family:
    """One registered family: its name, what its config calls it, and its reader."""

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    names: NameMap
    read: Reader
    reads: tuple[str, ...] = ()
    """Keys that it reads though others refuse them."""


FAMILIES: Registry[Family] = Registry("family")

LLAMA = NameMap(
    outer={"embedding.tokens": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    layer="model.layers.{i}",
    block={
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "attention.output": "self_attn.o_proj",
        "feedforward_norm": "post_attention_layernorm",
        "feedforward.gate": "mlp.gate_proj",
        "feedforward.up": "mlp.up_proj",
        "feedforward.down": "mlp.down_proj",
    },
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)
"""The names that Mistral, Qwen2, Qwen3 and DeciLM share with Llama."""
OLMO2 = replace(
    LLAMA,
    block={
        **LLAMA.block,
        "attention_norm": "post_attention_layernorm",
        "feedforward_norm": "post_feedforward_layernorm",
    },
)
OPENELM = NameMap(
    outer={
        "embedding.tokens": "transformer.token_embeddings",
        "norm": "transformer.norm",
        "head": "lm_head",
    },
    layer="transformer.layers.{i}",
    block={
        "attention_norm": "attn_norm",
        "attention.query": "attn.qkv_proj",
        "attention.key": "attn.qkv_proj",
        "attention.value": "attn.qkv_proj",
        "attention.query_norm": "attn.q_norm",
        "attention.key_norm": "attn.k_norm",
        "attention.output": "attn.out_proj",
        "feedforward_norm": "ffn_norm",
        "feedforward.gate": "ffn.proj_1",
        "feedforward.up": "ffn.proj_1",
        "feedforward.down": "ffn.proj_2",
    },
)

# Keys that change what is computed, and the values at which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "is_causal": (None, True),
    "partial_rotary_factor": (None, 1),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "clip_qkv": (None,),
    "add_cross_attention": (None, False),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "no_rope_layers": (None, []),
    "per_layer_config": (None, {}),
    "layer_shapes": (None,),
}


def family(
    name: str,
    *,
    names: NameMap,
    model_types: tuple[str, ...],
    architectures: tuple[str, ...],
    reads: tuple[str, ...] = (),
) -> Callable[[Reader], Reader]:
    """A decorator that registers a reader of configs whose `model_type` and `architectures` are among these."""

    def register(read: Reader) -> Reader:
        FAMILIES.register(name)(Family(name, model_types, architectures, names, read, reads))
        return read

    return register


def find_family(config: ConfigReader) -> Family:
    """The family of a config, by its `model_type` and `architectures`. Raises `UserError` for any other."""
    model_type = config.text("model_type")
    chosen = next((f for f in FAMILIES.values() if model_type in f.model_types), None)
    if chosen is None:
        known = ", ".join(sorted(t for f in FAMILIES.values() for t in f.model_types))
        raise config.wrong("model_type", model_type, f"one of {known}")
    architectures = config.get("architectures")
    # Another class under a known model_type is another model (a classifier, or code of their own).
    if architectures and (
        not isinstance(architectures, list) or architectures[0] not in chosen.architectures
    ):
        raise config.wrong("architectures", architectures, f"[{', '.join(chosen.architectures)}]")
    for key, neutral in _NEUTRAL.items():
        if config.get(key) not in neutral and key not in chosen.reads:
            raise config.refuse(key, "models here do not do this")
    return chosen


def refuse_sliding_window(config: ConfigReader, length: int, always: bool) -> None:
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(k not in ("full_attention", "sliding_attention") for k in kinds):
        raise config.wrong("layer_types", kinds, "a list of full_attention and sliding_attention")
    active = always or config.flag("use_sliding_window", False) or "sliding_attention" in kinds
    if active and 0 < config.integer("sliding_window", 0) < length:
        raise config.refuse(
            "sliding_window",
            f"layers here attend to everything, which differs beyond that length; the context is {length} "
            "(set max_position_embeddings to the window to import it for sequences no longer than that)",
        )


def expect(config: ConfigReader, key: str, default: str, valid: dict[str, str]) -> Any:
    """What one of the values `valid` stands for."""
    value = config.text(key, default)
    if value not in valid:
        raise config.wrong(key, value, f"one of {', '.join(valid)}")
    return valid[value]


_SWIGLU = {"silu": "swiglu", "swish": "swiglu"}


def _llama_shape(
    config: ConfigReader, n_tensors: int, *, layers: list[LayerShape] | None = None, **kinds: Any
) -> ModelShape:
    """The fields that Llama's descendants share; `kinds` are those in which they differ."""
    d_model, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", d_model // n_heads if n_heads else 0)
    expect(config, "hidden_act", "silu", _SWIGLU)
    if layers is None:
        same = LayerShape(
            n_heads, config.integer("num_key_value_heads", n_heads), config.integer("intermediate_size")
        )
        layers = [same] * read_layer_count(config, "num_hidden_layers", n_tensors)
    length = read_context(config, "max_position_embeddings", 2048)
    refuse_sliding_window(config, length, kinds.pop("always_sliding", False))
    return ModelShape(
        d_model=d_model,
        head_dim=head_dim,
        vocabulary=config.integer("vocab_size"),
        layers=tuple(layers),
        norm_eps=config.number("rms_norm_eps", kinds.pop("default_eps", 1e-6), least=0, most=1),
        tied_embeddings=config.flag("tie_word_embeddings", False),
        context=length,
        **rope.read_config(config),
        **kinds,
    )


def _biases(config: ConfigReader) -> dict[str, Any]:
    bias = config.flag("attention_bias", False)
    return {"qkv_bias": bias, "attention_output_bias": bias, "ffn_bias": config.flag("mlp_bias", False)}


@family("llama", names=LLAMA, model_types=("llama",), architectures=("LlamaForCausalLM",))
def read_llama(config: ConfigReader, n_tensors: int, layers: list[LayerShape] | None = None) -> Description:
    """Llama 1–3, SmolLM, SmolLM2 and everything else built as a Llama."""
    return Description(_llama_shape(config, n_tensors, layers=layers, **_biases(config)))


@family("mistral", names=LLAMA, model_types=("mistral",), architectures=("MistralForCausalLM",))
def read_mistral(config: ConfigReader, n_tensors: int) -> Description:
    """Mistral: a Llama whose every layer has the sliding window, where one is given."""
    return Description(_llama_shape(config, n_tensors, always_sliding=True))


@family("qwen2", names=LLAMA, model_types=("qwen2",), architectures=("Qwen2ForCausalLM",))
def read_qwen2(config: ConfigReader, n_tensors: int) -> Description:
    """Qwen2 and Qwen2.5: a Llama with biases on query, key and value."""
    return Description(_llama_shape(config, n_tensors, qkv_bias=True))


@family("qwen3", names=LLAMA, model_types=("qwen3",), architectures=("Qwen3ForCausalLM",))
def read_qwen3(config: ConfigReader, n_tensors: int, layers: list[LayerShape] | None = None) -> Description:
    """Qwen3: query and key are normalised in each head, before the rotation."""
    kinds = {**_biases(config), "ffn_bias": False, "qk_norm": "head"}
    return Description(_llama_shape(config, n_tensors, layers=layers, **kinds))


@family("olmo2", names=OLMO2, model_types=("olmo2",), architectures=("Olmo2ForCausalLM",))
def read_olmo2(config: ConfigReader, n_tensors: int, layers: list[LayerShape] | None = None) -> Description:
    """OLMo 2: norms after the branch, query and key normalised over their full width."""
    kinds = {**_biases(config), "ffn_bias": False, "qk_norm": "full", "norm_placement": "reordered"}
    return Description(_llama_shape(config, n_tensors, layers=layers, default_eps=1e-5, **kinds))


@family("deci", names=LLAMA, model_types=("nemotron-nas", "deci"), architectures=("DeciLMForCausalLM",))
def read_deci(config: ConfigReader, n_tensors: int) -> Description:
    """DeciLM / Nemotron-NAS: `block_configs` gives each layer its KV heads and FFN width, or leaves a
    part out.

    A block without attention and FFN changes nothing and is left out.
    """
    count = read_layer_count(config, "num_hidden_layers", n_tensors)
    blocks = config.get("block_configs")
    if not isinstance(blocks, list) or len(blocks) != count or not all(isinstance(b, dict) for b in blocks):
        raise config.wrong("block_configs", blocks, f"a list of {count} blocks, one for each layer")
    layers = [_deci_layer(config, i, block) for i, block in enumerate(blocks)]
    kept = tuple(i for i, layer in enumerate(layers) if layer.n_heads or layer.d_ff)
    notes = note_skipped(count - len(kept))
    shape = _llama_shape(config, n_tensors, layers=[layers[i] for i in kept], **_biases(config))
    return Description(shape, kept, notes)


_DECI_OTHER = (
    "replace_with_linear", "sparsify", "window_length", "num_sink_tokens", "moe", "mamba", "llama4",
)  # fmt: skip
"""What else a part of DeciLM's block may be."""


def _deci_layer(config: ConfigReader, index: int, block: dict[str, Any]) -> LayerShape:
    where = f"{config.where}: block_configs[{index}]"
    parts = [
        ConfigReader(ConfigReader(block, where).mapping(part) or {}, f"{where}.{part}")
        for part in ("attention", "ffn")
    ]
    for part in parts:
        for key in _DECI_OTHER:
            if part.get(key):
                raise part.refuse(key, "a layer here has attention or none, an FFN or none, and nothing else")
    attention, ffn = parts
    n_heads = n_kv_heads = d_ff = 0
    if not attention.flag("no_op", False):
        n_heads = config.integer("num_attention_heads")
        group = attention.integer("n_heads_in_group")
        if group == 0 or n_heads % group:
            raise attention.wrong("n_heads_in_group", group, f"a divisor of num_attention_heads {n_heads}")
        n_kv_heads = n_heads // group
    if not ffn.flag("no_op", False):
        if ffn.get("intermediate_size") is not None:
            d_ff = ffn.integer("intermediate_size")
        else:
            # DeciLM's rule: two thirds of the multiple, rounded up to 256.
            d_ff = -(-int(2 * ffn.number("ffn_mult") * config.integer("hidden_size") / 3) // 256) * 256
    return LayerShape(n_heads, n_kv_heads, d_ff)


@family("openelm", names=OPENELM, model_types=("openelm",), architectures=("OpenELMForCausalLM",))
def read_openelm(config: ConfigReader, n_tensors: int) -> Description:
    """OpenELM: heads and FFN width grow with depth; query, key and value are one matrix, gate and up
    another."""
    count = read_layer_count(config, "num_transformer_layers", n_tensors)
    d_model, divisor = config.integer("model_dim"), config.integer("ffn_dim_divisor", 256)
    multipliers = config.get("ffn_multipliers")
    if not isinstance(multipliers, list) or len(multipliers) != count or divisor == 0:
        raise config.wrong(
            "ffn_multipliers", multipliers, f"a list of {count} numbers, with ffn_dim_divisor above 0"
        )
    each = ConfigReader({f"ffn_multipliers[{i}]": x for i, x in enumerate(multipliers)}, config.where)
    d_ffs = [_make_divisible(each.number(key) * d_model, divisor) for key in each.values]
    heads = config.integers("num_query_heads", count)
    kv_heads = config.integers("num_kv_heads", count)
    if not config.flag("ffn_with_glu", True):
        raise config.refuse("ffn_with_glu", "only the gated FFN is supported")
    expect(config, "activation_fn_name", "swish", _SWIGLU)
    expect(config, "normalization_layer_name", "rms_norm", {"rms_norm": "rmsnorm"})
    shape = ModelShape(
        d_model=d_model,
        head_dim=config.integer("head_dim"),
        vocabulary=config.integer("vocab_size"),
        layers=tuple(map(LayerShape, heads, kv_heads, d_ffs)),
        norm_eps=1e-6,  # not in the config: a constant of its modeling code
        qk_norm="head" if config.flag("normalize_qk_projections", False) else "none",
        tied_embeddings=config.flag("share_input_output_layers", False),
        rope_theta=config.number("rope_freq_constant", 10_000.0, least=1),
        context=read_context(config, "max_context_length", 2048),
    )
    return Description(shape)


def _make_divisible(value: float, divisor: int) -> int:
    """corenet's rounding: to the nearest multiple, but never more than a tenth down."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
