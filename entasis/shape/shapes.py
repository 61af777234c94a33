"""What a model is, before it has a single weight.

A `ModelShape` describes a decoder-only language model; its primary part is the list of
`LayerShape`s. Twelve equal layers are only a list of twelve. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from entasis.errors import UserError
from entasis.shape import ffn_kinds, interfaces
from entasis.shape.interfaces import LEARNED, Interface

NormKind = Literal["rmsnorm", "layernorm"]
NormPlacement = Literal["pre", "reordered"]
QKNorm = Literal["none", "head", "full"]
Positions = Literal["rope", "learned"]

MOST, MOST_LAYERS = 10**9, 1_000
"""Larger widths and depths are typing errors."""


@dataclass(frozen=True, slots=True)
class LayerFFN:
    """A kind of FFN that one layer has instead of the model's, with that kind's own numbers."""

    kind: str
    numbers: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer: query heads, KV heads and FFN width.

    `n_heads == n_kv_heads == 0` is a layer without attention, `d_ff == 0` one without FFN; a layer has
    at least one of the two.
    """

    n_heads: int
    n_kv_heads: int
    d_ff: int
    ffn: LayerFFN | None = None
    """None is the model's kind. In files `{kind: NAME, NUMBER: …}`."""

    def to_dict(self) -> dict[str, Any]:
        """What a file holds of the layer: fields at their defaults are left out."""
        result: dict[str, Any] = {"n_heads": self.n_heads, "n_kv_heads": self.n_kv_heads, "d_ff": self.d_ff}
        return (
            result
            if self.ffn is None
            else {**result, "ffn": {"kind": self.ffn.kind, **dict(self.ffn.numbers)}}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Everything about a decoder-only language model but its weights.

    Raises `UserError` (a `ValueError`) when built invalid; the message names the layer, the field, the
    value and what would be valid.
    """

    d_model: int
    head_dim: int
    vocabulary: int
    layers: tuple[LayerShape, ...]
    norm: NormKind = "rmsnorm"
    norm_placement: NormPlacement = "pre"
    """`pre`: x + f(norm(x)), as in Llama. `reordered`: x + norm(f(x)), as in OLMo2."""
    norm_bias: bool = False
    norm_eps: float = 1e-5
    qk_norm: QKNorm = "none"
    """`head`: one weight of length head_dim for all heads (Qwen3, OpenELM). `full`: over the whole q or k
    width, before the heads are split (OLMo2)."""
    ffn: str = "swiglu"
    """A kind of `entasis.shape.ffn_kinds`: `swiglu` has three matrices, `gelu` (erf) and `gelu_tanh` have two."""
    tied_embeddings: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    ffn_bias: bool = False
    head_bias: bool = False
    positions: Positions = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    """As in a Hugging Face config: `{"rope_type": "linear", "factor": 2.0}` or `"llama3"` with its numbers."""
    context: int = 2048
    """Longest sequence the model is meant for; the number of rows of a learned position table."""
    norm_scaling: bool = False
    """LayerNorm scaling (2502.05795): the block's norm output is divided by sqrt(layer), layers from 1."""
    residual_scale: float = 1.0
    """Each branch is multiplied by this before it is added (CompleteP: base_layers / layers)."""
    attention_scale: float | None = None
    """Factor on q·k; None is 1/sqrt(head_dim). muP uses sqrt(base head_dim) / head_dim."""
    logit_scale: float = 1.0
    """Factor on the logits; muP uses base_d_model / d_model."""
    interface: Interface = LEARNED
    """How tokens enter; in files `{kind: NAME, option: value, …}`, see `entasis.shape.interfaces`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "interface", interfaces.read(self.interface))
        for name in ("d_model", "head_dim", "vocabulary", "context"):
            _positive(name, getattr(self, name))
        for name in ("norm_eps", "rope_theta", "residual_scale", "logit_scale", "attention_scale"):
            value = getattr(self, name)
            if name == "attention_scale" and value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= MOST:
                raise UserError(
                    f"shape: {name} is {_shown(value)}; it must be a number above 0, at most {MOST:,}"
                )
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"shape: {name} is {_shown(getattr(self, name))}; it must be true or false")
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", _read_rope_scaling(self.rope_scaling))
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise UserError(f"shape: {name} is {getattr(self, name)!r}; choose one of {choices}")
        if _ffn_kind("shape: ffn", self.ffn).numbers:
            raise UserError(f"shape: ffn is {self.ffn!r}, which has numbers of its own; name it in a layer")
        if self.positions == "rope" and self.head_dim % 2:
            raise UserError(f"shape: head_dim is {self.head_dim}; rotary positions need an even number")
        if self.norm_bias and self.norm == "rmsnorm":
            raise UserError("shape: norm_bias is true, but rmsnorm has no bias; use norm: layernorm")
        if not self.layers:
            raise UserError("shape: layers is empty; a model needs at least one layer")
        if self.n_layers > MOST_LAYERS:
            raise UserError(f"shape: there are {self.n_layers:,} layers; the most are {MOST_LAYERS:,}")
        for i, layer in enumerate(self.layers):
            _check_layer(i, layer)
        if self.tied_embeddings and not self.interface.learns:
            name = interfaces.name_of(self.interface)
            raise UserError(
                f"shape: interface {name} is frozen and tied_embeddings would freeze the head; set it to false"
            )
        self.interface.check(self)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def uniform(self) -> bool:
        """Whether all layers are equal."""
        return len(set(self.layers)) == 1

    @property
    def distinct_layers(self) -> int:
        """How many different layer shapes there are: each is compiled once."""
        return len(set(self.layers))

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary that `from_dict` reads back; what `shape.json` holds."""
        result = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        result["layers"] = [layer.to_dict() for layer in self.layers]
        result["rope_scaling"] = dict(self.rope_scaling) if self.rope_scaling else None
        del result["interface"]
        if self.interface != LEARNED:
            result["interface"] = interfaces.to_dict(self.interface)
        return result

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> ModelShape:
        """Reads `to_dict`'s result. Raises `UserError` for missing and unknown fields."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(source) - known):
            raise UserError(f"shape: unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}")
        required = {"d_model", "head_dim", "vocabulary", "layers"}
        if missing := sorted(required - set(source)):
            raise UserError(f"shape: {missing[0]} is missing")
        if not isinstance(source["layers"], Sequence) or isinstance(source["layers"], str):
            raise UserError("shape: layers must be a list of {n_heads, n_kv_heads, d_ff}")
        return cls(**{**source, "layers": read_layers(source["layers"])})


_CHOICES: dict[str, Any] = {
    "norm": NormKind,
    "norm_placement": NormPlacement,
    "qk_norm": QKNorm,
    "positions": Positions,
}

_SWITCHES = "norm_bias tied_embeddings qkv_bias attention_output_bias ffn_bias head_bias norm_scaling".split()
_ROPE_SCALING: dict[object, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _read_rope_scaling(scaling: object) -> Mapping[str, Any]:
    """The scaling with its kind under `rope_type`, which older configs call `type`."""
    if not isinstance(scaling, Mapping):
        raise UserError(f"shape: rope_scaling is {_shown(scaling)}; write {{rope_type: linear, factor: 2.0}}")
    if not scaling:
        return scaling
    kind = scaling.get("rope_type", scaling.get("type"))
    if not isinstance(kind, str) or kind not in _ROPE_SCALING:
        raise UserError(
            f"shape: rope_scaling is of type {_shown(kind)}; choose {', '.join(map(str, _ROPE_SCALING))}"
        )
    if odd := [str(name) for name in scaling if name not in ("rope_type", "type", *_ROPE_SCALING[kind])]:
        raise UserError(f"shape: rope_scaling has {_shown(odd[0])}, which {kind} has not")
    for name in _ROPE_SCALING[kind]:
        value = scaling.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= MOST:
            raise UserError(f"shape: rope_scaling.{name} is {_shown(value)}; it must be a number above 0")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError("shape: rope_scaling.low_freq_factor must be below high_freq_factor")
    if "type" not in scaling:
        return scaling
    return {"rope_type": kind, **{name: scaling[name] for name in _ROPE_SCALING[kind]}}


def _ffn_kind(where: str, name: object) -> ffn_kinds.FFNKind:
    if not isinstance(name, str) or name not in ffn_kinds.KINDS:
        raise UserError(f"{where} is {name!r}; choose one of {', '.join(ffn_kinds.KINDS)}")
    return ffn_kinds.KINDS[name]


def _whole(where: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
        raise UserError(
            f"{where} is {_shown(value)}; it must be a whole number of at least {least}, at most {MOST:,}"
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _positive(name: str, value: object) -> None:
    _whole(f"shape: {name}", value, 1)


def read_layers(source: Sequence[object]) -> tuple[LayerShape, ...]:
    """Layers from mappings {n_heads, n_kv_heads, d_ff}. Raises `UserError` naming the layer."""
    return tuple(_read_layer(i, layer) for i, layer in enumerate(source))


def _read_layer(index: int, source: object) -> LayerShape:
    if isinstance(source, LayerShape):
        return source
    names = [f.name for f in dataclasses.fields(LayerShape)]
    required = {f.name for f in dataclasses.fields(LayerShape) if f.default is dataclasses.MISSING}
    if not isinstance(source, Mapping) or not required <= set(source) <= set(names):
        raise UserError(
            f"layer {index}: must have {', '.join(sorted(required))} and may have "
            f"{', '.join(n for n in names if n not in required)}; it is {source!r}"
        )
    ffn = source.get("ffn")
    if ffn is None:
        return LayerShape(**source)
    if not isinstance(ffn, Mapping) or "kind" not in ffn:
        raise UserError(f"layer {index}: ffn is {ffn!r}; write {{kind: NAME}} with the kind's numbers")
    numbers = tuple(sorted((k, v) for k, v in ffn.items() if k != "kind"))
    return LayerShape(**{**source, "ffn": LayerFFN(ffn["kind"], numbers)})


def _check_layer(index: int, layer: LayerShape) -> None:
    for name in ("n_heads", "n_kv_heads", "d_ff"):
        value = getattr(layer, name)
        _whole(f"layer {index}: {name}", value, 0)
    if layer.n_heads == 0 and layer.d_ff == 0:
        raise UserError(f"layer {index}: n_heads and d_ff are both 0; a layer needs attention or an FFN")
    if (layer.n_heads == 0) != (layer.n_kv_heads == 0):
        raise UserError(
            f"layer {index}: n_heads is {layer.n_heads} and n_kv_heads is {layer.n_kv_heads}; "
            "both are 0 (no attention) or neither"
        )
    if layer.n_kv_heads and layer.n_heads % layer.n_kv_heads:
        valid = ", ".join(str(k) for k in range(1, layer.n_heads + 1) if layer.n_heads % k == 0)
        raise UserError(
            f"layer {index}: n_kv_heads is {layer.n_kv_heads}, which does not divide n_heads {layer.n_heads}; "
            f"valid are {valid}"
        )
    if layer.ffn is not None:
        kind = _ffn_kind(f"layer {index}: ffn.kind", layer.ffn.kind)
        numbers = dict(layer.ffn.numbers)
        if set(numbers) != set(kind.numbers):
            wanted = ", ".join(kind.numbers) or "no numbers"
            raise UserError(
                f"layer {index}: ffn has {', '.join(numbers) or 'no numbers'}; {kind.name} takes {wanted}"
            )
        for name, value in numbers.items():
            _positive(f"layer {index}: ffn.{name}", value)
