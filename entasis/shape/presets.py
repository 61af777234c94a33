"""Published models by name. Each is a profile with its published numbers, not a list typed in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entasis.registry import Registry
from entasis.shape import interfaces
from entasis.shape.shapes import LayerShape, ModelShape

PRESETS: Registry[Mapping[str, Any] | ModelShape] = Registry("shape: preset")
"""A specification (`entasis.shape.specification.preset` resolves it) or, where all layers are equal, the shape itself."""


def names() -> list[str]:
    """All presets."""
    return list(PRESETS)


# Crown, Frame, Reverse (2509.06518): published table and the authors' code. Heads in groups of 3 per KV head.
_CROWN = {
    "d_model": 768,
    "head_dim": 64,
    "vocabulary": 50_304,
    "norm_placement": "reordered",
    "qk_norm": "full",
    "norm_eps": 1e-6,
    "rope_theta": 500_000.0,
    "context": 1024,
    "q_per_kv": 3,
    "rounding": "crown-paper",
}
for _name, _profile, _layers, _ffn, _heads in (
    ("baseline-12", "isotropic", 12, {"value": 4.0}, {"value": 1.0}),
    ("vanilla-12", "vanilla", 12, {"start": 2.0, "end": 5.3}, {"start": 0.5, "end": 2.0}),
    ("baseline-18", "isotropic", 18, {"value": 2.5}, {"value": 0.75}),
    ("vanilla-18", "vanilla", 18, {"start": 1.0, "end": 4.0}, {"start": 0.5, "end": 1.0}),
    ("framed-18", "framed", 18, {"start": 0.5, "end": 4.0}, {"start": 0.5, "end": 1.0}),
    ("reverse-18", "reverse", 18, {"start": 4.0, "end": 0.5}, {"start": 1.0, "end": 0.5}),
    ("crown-18", "crown", 18, {}, {}),
):
    PRESETS[f"crown-paper/{_name}"] = dict(
        profile=_profile, layers=_layers, ffn_multipliers=_ffn, head_multipliers=_heads, **_CROWN
    )

# OpenELM (2404.14619; corenet general_gpt.py): FFN 0.5 → 4.0, heads 0.5 → 1.0, four query heads per KV head.
for _size, _layers, _width, _head_dim in (
    ("270m", 16, 1280, 64),
    ("450m", 20, 1536, 64),
    ("1.1b", 28, 2048, 64),
    ("3b", 36, 3072, 128),
):
    PRESETS[f"openelm/{_size}"] = {
        "profile": "vanilla",
        "layers": _layers,
        "d_model": _width,
        "head_dim": _head_dim,
        "ffn_multipliers": {"start": 0.5, "end": 4.0},
        "vocabulary": 32_000,
        "tied_embeddings": True,
        "qk_norm": "head",
        "norm_eps": 1e-6,
        "q_per_kv": 4,
        "rounding": "corenet",
    }

PRESETS["smollm2/135m"] = ModelShape(
    d_model=576,
    head_dim=64,
    vocabulary=49_152,
    layers=(LayerShape(9, 3, 1536),) * 30,
    tied_embeddings=True,
    rope_theta=100_000.0,
    context=8192,
)

PRESETS["gpt2/small"] = ModelShape(
    d_model=768,
    head_dim=64,
    vocabulary=50_257,
    layers=(LayerShape(12, 12, 3072),) * 12,
    norm="layernorm",
    norm_bias=True,
    ffn="gelu_tanh",
    tied_embeddings=True,
    qkv_bias=True,
    attention_output_bias=True,
    ffn_bias=True,
    positions="learned",
    context=1024,
)

# Growing on a frozen interface (2507.07129). The papers publish no code; all their parameter counts follow from this.
_CONSTRUCTIVE: dict[str, tuple[int, dict[str, Any]]] = {
    "9-layer-frozen-table": (9, {"kind": "glyph"}),  # published: 180.506 M, without the table
    "9-layer-trainable": (9, {"kind": "learned"}),  # 247.614 M
    "9-layer-binary": (
        9,
        {"kind": "binary", "order": "interleaved", "values": "bits", "stored": True},
    ),  # 181.554 M
    "16-layer-binary": (
        16,
        {"kind": "binary", "order": "interleaved", "values": "bits", "stored": True},
    ),  # 269.699 M
}


def _constructive(n: int, interface: dict[str, Any]) -> ModelShape:
    return ModelShape(
        d_model=1024,
        head_dim=32,
        vocabulary=65_536,
        layers=(LayerShape(32, 32, 4096),) * n,
        norm="layernorm",
        norm_bias=True,
        ffn="gelu",
        ffn_bias=True,
        head_bias=True,
        context=1024,
        interface=interfaces.read(interface),
    )


for _name, (_layers, _interface) in _CONSTRUCTIVE.items():
    PRESETS[f"constructive/{_name}"] = _constructive(_layers, _interface)
