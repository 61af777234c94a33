"""The architectures of GGUF files: their tensor names, and what the metadata says of the model.

Import and export share an architecture's names. GGUF gives per-layer numbers as arrays under the same keys. Keys of an
architecture that are not known here, unless they are zero, are refused: they would change what is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from entasis.errors import UserError
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

if TYPE_CHECKING:
    from entasis.interop.gguf_reader import GGUFFile

Reader = Callable[["GGUFFile", ConfigReader], Description]


@dataclass(frozen=True)
class Architecture:
    """One registered architecture: its tensor names, and the reader of its metadata."""

    names: NameMap
    read: Reader


ARCHITECTURES: Registry[Architecture] = Registry("GGUF architecture")

PLAIN = NameMap(
    outer={
        "embedding.tokens": "token_embd",
        "embedding.positions": "position_embd",
        "norm": "output_norm",
        "head": "output",
    },
    layer="blk.{i}",
    block={
        "attention_norm": "attn_norm",
        "attention.query": "attn_q",
        "attention.key": "attn_k",
        "attention.value": "attn_v",
        "attention.query_norm": "attn_q_norm",
        "attention.key_norm": "attn_k_norm",
        "attention.output": "attn_output",
        "feedforward_norm": "ffn_norm",
        "feedforward.gate": "ffn_gate",
        "feedforward.up": "ffn_up",
        "feedforward.down": "ffn_down",
    },
)
"""The names of Qwen2 and Qwen3; other architectures differ from them in a few."""
LLAMA = replace(PLAIN, interleaved=True, ignored=r"rope_freqs\.weight")
OLMO2 = replace(
    PLAIN,
    block={
        **PLAIN.block,
        "attention_norm": "post_attention_norm",
        "feedforward_norm": "post_ffw_norm",
    },
)
FUSED = replace(
    PLAIN,
    block={**PLAIN.block, **{f"attention.{part}": "attn_qkv" for part in ("query", "key", "value")}},
)

_KNOWN = {
    "vocab_size", "context_length", "block_count", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.sliding_window",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned",
}  # fmt: skip


def read_description(file: GGUFFile) -> tuple[str, Description]:
    """A GGUF file's architecture and what it says of its model. Raises `UserError` for those not supported."""
    general = ConfigReader(file.metadata, file.path.name)
    name = general.text("general.architecture")
    if name not in ARCHITECTURES:
        raise general.wrong("general.architecture", name, f"one of {', '.join(sorted(ARCHITECTURES))}")
    settings = ConfigReader(file.metadata, file.path.name, f"{name}.")
    for key, value in file.metadata.items():
        short = key.removeprefix(settings.prefix)
        # Zero, false and the empty string switch a thing off; anything else, arrays included, would be it.
        off = isinstance(value, int | float | str) and not value
        if short == "attention.causal":  # the one thing that models here do, and false would switch off
            off = value is True
        if short != key and short not in _KNOWN and not off:
            raise settings.refuse(short, "models here do not do this")
    return name, ARCHITECTURES[name].read(file, settings)


def _layers(file: GGUFFile, settings: ConfigReader) -> list[LayerShape]:
    count = read_layer_count(settings, "block_count", len(file.tensors))
    heads = settings.integers("attention.head_count", count)
    kv_heads = settings.integers("attention.head_count_kv", count, heads)
    d_ffs = settings.integers("feed_forward_length", count)
    return list(map(LayerShape, heads, kv_heads, d_ffs))


def _shape(
    file: GGUFFile, settings: ConfigReader, layers: list[LayerShape] | None = None, **kinds: Any
) -> ModelShape:
    names, d_model = file.tensors, settings.integer("embedding_length")
    layers = layers or _layers(file, settings)
    head_dim = settings.integer("attention.key_length", d_model // max(1, *(x.n_heads for x in layers)))
    for key in ("attention.value_length", "rope.dimension_count"):
        if settings.integer(key, head_dim) != head_dim:
            raise settings.refuse(key, f"it must equal the head size {head_dim}")
    length = read_context(settings, "context_length", 2048)
    if 0 < settings.integer("attention.sliding_window", 0) < length:
        raise settings.refuse("attention.sliding_window", "layers here attend to everything")
    if "token_embd.weight" not in names:
        raise UserError(f"{file.path.name}: tensor token_embd.weight is missing")

    def has(tensor: str) -> bool:
        return any(name.endswith(f".{tensor}") for name in names)

    rotary = rope.read_gguf(file, settings, head_dim) if kinds.get("positions", "rope") == "rope" else {}
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


def _read(file: GGUFFile, settings: ConfigReader, **kinds: Any) -> Description:
    """What differs between most architectures are the `kinds` of their parts."""
    return Description(_shape(file, settings, **kinds))


def _read_deci(file: GGUFFile, settings: ConfigReader) -> Description:
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
    notes = note_skipped(len(layers) - len(kept))
    if alone := [i for i, layer in enumerate(layers) if layer.n_heads and not layer.d_ff]:
        notes += (f"layer {alone[0]} has attention and no FFN; llama.cpp would leave its attention out",)
    shape = _shape(file, settings, [layers[i] for i in kept])
    return Description(shape, kept, notes)


def _register(name: str, names: NameMap, **kinds: Any) -> None:
    ARCHITECTURES.register(name)(Architecture(names, functools.partial(_read, **kinds)))


# Llama, Mistral, SmolLM and SmolLM2
_register("llama", LLAMA)
ARCHITECTURES.register("deci")(Architecture(LLAMA, _read_deci))
_register("qwen2", PLAIN)
_register("qwen3", PLAIN, qk_norm="head")
_register("olmo2", OLMO2, qk_norm="full", norm_placement="reordered")
_register("openelm", FUSED, qk_norm="head")
# Its matrices are [out, in] in GGUF.
_register(
    "gpt2",
    FUSED,
    norm="layernorm",
    norm_bias=True,
    ffn="gelu_tanh",
    positions="learned",
    eps_key="attention.layer_norm_epsilon",
)
