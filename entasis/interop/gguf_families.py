"""The architectures of GGUF files that can be imported: metadata → `Plan`. One registered function each.

GGUF gives per-layer numbers as arrays under the same keys. Keys of an architecture that are not known
here, unless they are zero, are refused: they would change what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from entasis.errors import UserError
from entasis.interop import rope
from entasis.interop.gguf_reader import GGUFFile
from entasis.interop.hf_families import context, layer_count, left_out
from entasis.interop.plan import Plan
from entasis.interop.settings import Settings
from entasis.shape.shapes import LayerShape, ModelShape

Architecture = Callable[[GGUFFile, Settings], Plan]
ARCHITECTURES: dict[str, Architecture] = {}

GGUF_MODULES = {
    "embedding.tokens": "token_embd",
    "embedding.positions": "position_embd",
    "blocks.{i}.attention_norm": "blk.{i}.attn_norm",
    "blocks.{i}.attention.query": "blk.{i}.attn_q",
    "blocks.{i}.attention.key": "blk.{i}.attn_k",
    "blocks.{i}.attention.value": "blk.{i}.attn_v",
    "blocks.{i}.attention.query_norm": "blk.{i}.attn_q_norm",
    "blocks.{i}.attention.key_norm": "blk.{i}.attn_k_norm",
    "blocks.{i}.attention.output": "blk.{i}.attn_output",
    "blocks.{i}.feedforward_norm": "blk.{i}.ffn_norm",
    "blocks.{i}.feedforward.gate": "blk.{i}.ffn_gate",
    "blocks.{i}.feedforward.up": "blk.{i}.ffn_up",
    "blocks.{i}.feedforward.down": "blk.{i}.ffn_down",
    "norm": "output_norm",
    "head": "output",
}
"""Ours → GGUF's; architectures differ from it in a few entries."""

FUSED = {f"blocks.{{i}}.attention.{part}": "blk.{i}.attn_qkv" for part in ("query", "key", "value")}

_KNOWN = {
    "vocab_size", "context_length", "block_count", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.sliding_window",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned",
}  # fmt: skip


def architecture(name: str) -> Callable[[Architecture], Architecture]:
    """Registers the reader of GGUF files whose `general.architecture` is `name`."""

    def register(read: Architecture) -> Architecture:
        ARCHITECTURES[name] = read
        return read

    return register


def plan_of(file: GGUFFile) -> tuple[str, Plan]:
    """The architecture of a GGUF file and its plan. Raises `UserError` for those not supported."""
    general = Settings(file.metadata, file.path.name)
    name = general.text("general.architecture")
    if name not in ARCHITECTURES:
        raise general.wrong("general.architecture", name, f"one of {', '.join(sorted(ARCHITECTURES))}")
    settings = Settings(file.metadata, file.path.name, f"{name}.")
    for key, value in file.metadata.items():
        short = key.removeprefix(settings.prefix)
        # Zero, false and the empty string switch a thing off; anything else, arrays included, would be it.
        off = isinstance(value, int | float | str) and not value
        if short != key and short not in _KNOWN and not off:
            raise settings.refuse(short, "models here do not do this")
    return name, ARCHITECTURES[name](file, settings)


def _layers(file: GGUFFile, settings: Settings) -> list[LayerShape]:
    count = layer_count(settings, "block_count", len(file.tensors))
    heads = settings.wholes("attention.head_count", count)
    kv_heads = settings.wholes("attention.head_count_kv", count, heads)
    d_ffs = settings.wholes("feed_forward_length", count)
    return list(map(LayerShape, heads, kv_heads, d_ffs))


def _shape(
    file: GGUFFile, settings: Settings, layers: list[LayerShape] | None = None, **kinds: Any
) -> ModelShape:
    names, d_model = file.tensors, settings.whole("embedding_length")
    layers = layers or _layers(file, settings)
    head_dim = settings.whole("attention.key_length", d_model // max(1, *(x.n_heads for x in layers)))
    for key in ("attention.value_length", "rope.dimension_count"):
        if settings.whole(key, head_dim) != head_dim:
            raise settings.refuse(key, f"it must equal the head size {head_dim}")
    length = context(settings, "context_length", 2048)
    if 0 < settings.whole("attention.sliding_window", 0) < length:
        raise settings.refuse("attention.sliding_window", "layers here attend to everything")
    if "token_embd.weight" not in names:
        raise UserError(f"{file.path.name}: tensor token_embd.weight is missing")

    def has(tensor: str) -> bool:
        return any(name.endswith(f".{tensor}") for name in names)

    rotary = rope.of_gguf(file, settings, head_dim) if kinds.get("positions", "rope") == "rope" else {}
    return ModelShape(
        d_model=d_model,
        head_dim=head_dim,
        vocabulary=names["token_embd.weight"].size[0],
        layers=tuple(layers),
        norm_eps=settings.number(kinds.pop("eps_key", "attention.layer_norm_rms_epsilon"), least=0, most=1),
        tied_embeddings="output.weight" not in names,
        qkv_bias=has("attn_q.bias") or has("attn_qkv.bias"),
        attention_output_bias=has("attn_output.bias"),
        ffn_bias=has("ffn_up.bias"),
        context=length,
        **rotary,
        **kinds,
    )


@architecture("llama")
def llama(file: GGUFFile, settings: Settings) -> Plan:
    """Llama, Mistral, SmolLM and SmolLM2; rows of query and key are interleaved."""
    return Plan(
        shape=_shape(file, settings), modules=GGUF_MODULES, interleaved=True, ignored=r"rope_freqs\.weight"
    )


@architecture("deci")
def deci(file: GGUFFile, settings: Settings) -> Plan:
    """DeciLM / Nemotron-NAS: a llama with heads, KV heads and FFN width for each layer, 0 for left out.

    As in the Hugging Face form, a layer without both changes nothing and is left out.
    """
    layers = _layers(file, settings)
    for i, layer in enumerate(layers):
        if layer.n_heads and not layer.n_kv_heads:
            raise settings.refuse(
                "attention.head_count_kv",
                f"layer {i} has a linear map for attention, which models here have not",
            )
    kept = tuple(i for i, layer in enumerate(layers) if layer.n_heads or layer.d_ff)
    notes = left_out(len(layers) - len(kept))
    if alone := [i for i, layer in enumerate(layers) if layer.n_heads and not layer.d_ff]:
        notes += (f"layer {alone[0]} has attention and no FFN; llama.cpp would leave its attention out",)
    shape = _shape(file, settings, [layers[i] for i in kept])
    return Plan(
        shape=shape,
        modules=GGUF_MODULES,
        layers=kept,
        interleaved=True,
        ignored=r"rope_freqs\.weight",
        notes=notes,
    )


@architecture("qwen2")
def qwen2(file: GGUFFile, settings: Settings) -> Plan:
    """Qwen2 and Qwen2.5."""
    return Plan(shape=_shape(file, settings), modules=GGUF_MODULES)


@architecture("qwen3")
def qwen3(file: GGUFFile, settings: Settings) -> Plan:
    """Qwen3: per-head QK-norm."""
    return Plan(shape=_shape(file, settings, qk_norm="head"), modules=GGUF_MODULES)


@architecture("olmo2")
def olmo2(file: GGUFFile, settings: Settings) -> Plan:
    """OLMo 2: norms after the branch, QK-norm over the full width."""
    modules = {
        **GGUF_MODULES,
        "blocks.{i}.attention_norm": "blk.{i}.post_attention_norm",
        "blocks.{i}.feedforward_norm": "blk.{i}.post_ffw_norm",
    }
    return Plan(shape=_shape(file, settings, qk_norm="full", norm_placement="reordered"), modules=modules)


@architecture("openelm")
def openelm(file: GGUFFile, settings: Settings) -> Plan:
    """OpenELM: per-layer arrays, fused qkv, per-head QK-norm."""
    return Plan(shape=_shape(file, settings, qk_norm="head"), modules={**GGUF_MODULES, **FUSED})


@architecture("gpt2")
def gpt2(file: GGUFFile, settings: Settings) -> Plan:
    """GPT-2: learned positions, LayerNorm, biases, fused qkv (stored [out, in] in GGUF)."""
    shape = _shape(
        file,
        settings,
        norm="layernorm",
        norm_bias=True,
        ffn="gelu_tanh",
        positions="learned",
        eps_key="attention.layer_norm_epsilon",
    )
    return Plan(shape=shape, modules={**GGUF_MODULES, **FUSED})
