"""Every parameter of a model shape, once: its name, size, layer, role and the meaning of each axis.

Counts, FLOPs, initial values, optimizer groups, padding, cutting, import and export are derived from here. Nothing
imports torch.

| role                                            | axes                                | part          |
|-------------------------------------------------|-------------------------------------|---------------|
| `embedding`, `position`                         | vocabulary or position, residual    | `embedding`   |
| `code` (of a frozen interface)                  | vocabulary, code                    | `embedding`   |
| `attention_norm`, `feedforward_norm`            | residual                            | `norms`       |
| `query`                                         | query, residual                     | `attention`   |
| `key`, `value`                                  | kv, residual                        | `attention`   |
| `attention_output`                              | residual, query                     | `attention`   |
| `query_norm`, `key_norm`                        | head_dim; or query, kv (full width) | `attention`   |
| the FFN kind's matrices, as `gate`, `up`, `down`| ffn, residual; residual, ffn        | `feedforward` |
| `final_norm`                                    | residual                            | `final_norm`  |
| `head`                                          | vocabulary, residual                | `head`        |

The axis `query` is n_heads × head_dim long, `kv` n_kv_heads × head_dim. A bias has its matrix's role and first axis. A
tied head is an entry that names the one whose storage it is. A stage with LoRA has two more for each adapted matrix, of role
and part `adapter` (`adapters`): A with axes rank and what the matrix reads, B with what it writes and rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from entasis.shape import ffn_kinds
from entasis.shape.shapes import LayerShape, ModelShape


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a model."""

    name: str
    layer: int | None
    """None: of no layer."""
    part: str
    role: str
    axes: tuple[str, ...]
    size: tuple[int, ...]
    is_bias: bool = False
    shares: str | None = None
    """The parameter whose storage this one is."""
    frozen: bool = False
    """Part of an interface that is never trained."""

    @property
    def count(self) -> int:
        return math.prod(self.size)

    @property
    def is_matrix(self) -> bool:
        return len(self.axes) > 1


@dataclass(frozen=True, slots=True)
class _Entry:
    """A parameter of every layer of one kind; its sizes are the layer's."""

    name: str
    part: str
    role: str
    axes: tuple[str, ...]
    is_bias: bool = False


def parameters(shape: ModelShape) -> tuple[Parameter, ...]:
    """Every parameter of `Transformer(shape)`, in the model's order; a tied head comes last."""
    outside = outer_parameters(shape)
    layers = [p for i in range(shape.n_layers) for p in layer_parameters(shape, i)]
    before = [p for p in outside if p.part == "embedding"]
    return (*before, *layers, *outside[len(before) :])


def learnable(shape: ModelShape) -> tuple[str, ...]:
    """Names of all that may be trained, in the model's order."""
    return tuple(p.name for p in parameters(shape) if p.shares is None and not p.frozen)


def adapters(shape: ModelShape, ranks: Mapping[str, int]) -> tuple[Parameter, ...]:
    """The low-rank adapters beside the matrices named in `ranks`, by the names that peft gives them."""
    result = []
    for p in parameters(shape) if ranks else ():
        if (rank := ranks.get(p.name)) is None:
            continue
        module = p.name.removesuffix(".weight")
        result += [
            Parameter(f"{module}.lora_A.default.weight", p.layer, "adapter", "adapter", ("rank", p.axes[1]), (rank, p.size[1])),
            Parameter(f"{module}.lora_B.default.weight", p.layer, "adapter", "adapter", (p.axes[0], "rank"), (p.size[0], rank)),
        ]  # fmt: skip
    return tuple(result)


def sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name → size of every parameter that is stored, in the model's order."""
    return {p.name: p.size for p in parameters(shape) if p.shares is None}


def outer_parameters(shape: ModelShape) -> tuple[Parameter, ...]:
    """Those of no layer: embedding, final norm and head."""
    lengths = {"residual": shape.d_model, "vocabulary": shape.vocabulary, "position": shape.context}
    head = _Entry("head.weight", "head", "head", ("vocabulary", "residual"))
    entries, table = list[_Entry](), None
    if (stored := shape.interface.table(shape)) is not None:
        name, axes, length = stored
        table = _Entry(name, "embedding", "code" if "code" in axes else "embedding", axes)
        entries, lengths["code"] = [table], length
    if shape.positions == "learned":
        entries.append(
            _Entry("embedding.positions.weight", "embedding", "position", ("position", "residual"))
        )
    entries += _norm("norm", "final_norm", "final_norm", shape.norm_bias)
    if not shape.tied_embeddings:
        entries.append(head)
    if shape.head_bias:
        entries.append(_Entry("head.bias", "head", "head", ("vocabulary",), is_bias=True))
    if shape.tied_embeddings:
        entries.append(head)
    return tuple(
        Parameter(
            e.name,
            None,
            e.part,
            e.role,
            e.axes,
            tuple(lengths[axis] for axis in e.axes),
            e.is_bias,
            table.name if e is head and shape.tied_embeddings and table else None,
            e is table and not shape.interface.learns,
        )
        for e in entries
    )


def layer_parameters(shape: ModelShape, index: int) -> tuple[Parameter, ...]:
    """Every parameter of one layer, in the model's order."""
    lengths = axis_sizes(shape, shape.layers[index])
    return tuple(
        Parameter(
            f"blocks.{index}.{entry.name}",
            index,
            entry.part,
            entry.role,
            entry.axes,
            tuple(lengths[axis] for axis in entry.axes),
            entry.is_bias,
        )
        for entry in layer_entries(shape, shape.layers[index])
    )


def count_layer(shape: ModelShape, layer: LayerShape) -> tuple[int, int]:
    """(all numbers, those in matrices) of one layer: `layer_parameters` summed, without building it."""
    lengths = axis_sizes(shape, layer)
    total = matrices = 0
    for entry in layer_entries(shape, layer):
        count = math.prod([lengths[axis] for axis in entry.axes])
        total += count
        matrices += count if len(entry.axes) > 1 else 0
    return total, matrices


def axis_sizes(shape: ModelShape, layer: LayerShape) -> dict[str, int]:
    """Length of every axis that a parameter of this layer may have."""
    lengths = {
        "residual": shape.d_model,
        "query": layer.n_heads * shape.head_dim,
        "kv": layer.n_kv_heads * shape.head_dim,
        "head_dim": shape.head_dim,
        "ffn": layer.d_ff,
    }
    return lengths if layer.ffn is None else {**lengths, **dict(layer.ffn.numbers)}


def ffn_kind(shape: ModelShape, layer: LayerShape) -> ffn_kinds.FFNKind:
    """The layer's own kind of FFN, or the model's."""
    return ffn_kinds.KINDS[shape.ffn if layer.ffn is None else layer.ffn.kind]


def layer_entries(shape: ModelShape, layer: LayerShape) -> tuple[_Entry, ...]:
    """The parameters of a layer by their names within the block; equal for layers that differ in sizes only."""
    kind = ffn_kind(shape, layer).name if layer.d_ff else None
    return _layer_entries(
        bool(layer.n_heads),
        kind,
        shape.norm_bias,
        shape.qkv_bias,
        shape.attention_output_bias,
        shape.qk_norm,
        shape.ffn_bias,
    )


@functools.cache
def _layer_entries(
    has_attention: bool,
    ffn: str | None,
    norm_bias: bool,
    qkv_bias: bool,
    attention_output_bias: bool,
    qk_norm: str,
    ffn_bias: bool,
) -> tuple[_Entry, ...]:
    result: list[_Entry] = []

    def linear(name: str, part: str, role: str, axes: tuple[str, ...], bias: bool) -> None:
        result.append(_Entry(f"{name}.weight", part, role, axes))
        if bias:
            result.append(_Entry(f"{name}.bias", part, role, axes[:1], is_bias=True))

    if has_attention:
        result += _norm("attention_norm", "norms", "attention_norm", norm_bias)
        for role, axis in (("query", "query"), ("key", "kv"), ("value", "kv")):
            linear(f"attention.{role}", "attention", role, (axis, "residual"), qkv_bias)
        output = ("residual", "query")
        linear("attention.output", "attention", "attention_output", output, attention_output_bias)
        if qk_norm != "none":
            for role, axis in (("query_norm", "query"), ("key_norm", "kv")):
                width = axis if qk_norm == "full" else "head_dim"
                result.append(_Entry(f"attention.{role}.weight", "attention", role, (width,)))
    if ffn is not None:
        result += _norm("feedforward_norm", "norms", "feedforward_norm", norm_bias)
        for role, axes in ffn_kinds.KINDS[ffn].matrices:
            linear(f"feedforward.{role}", "feedforward", role, axes, ffn_bias)
    return tuple(result)


def _norm(name: str, part: str, role: str, bias: bool) -> list[_Entry]:
    weight = _Entry(f"{name}.weight", part, role, ("residual",))
    return [weight, _Entry(f"{name}.bias", part, role, ("residual",), is_bias=True)] if bias else [weight]
