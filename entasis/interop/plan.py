"""Where every parameter of a model comes from: the bridge between someone's tensor names and ours.

A family (`hf_families`, `gguf_families`) only says which of their modules is which of ours. This file
turns that into one `Piece` per parameter, having checked that nothing is missing, left over or of another
size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from entasis.errors import UserError
from entasis.interop.settings import shown
from entasis.shape import layout
from entasis.shape.shapes import ModelShape

Sizes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a family makes of a checkpoint's description."""

    shape: ModelShape
    modules: Mapping[str, str]
    """Our module → theirs, `{i}` standing for the layer. Several of ours that come from one of theirs are
    its rows one after the other, in this order (a fused qkv is query, key, value)."""
    layers: tuple[int, ...] = ()
    """Their index of each of our layers; empty: the same."""
    conv1d: bool = False
    """Linear weights of the blocks are stored [in, out], as GPT-2's are."""
    interleaved: bool = False
    """Query and key rows are in the pair-interleaved order of GGUF's llama instead of half-split."""
    ignored: str = r"(?!)"
    """Pattern of tensors that hold no parameters (buffers of old checkpoints)."""
    notes: tuple[str, ...] = ()
    """What was done that a user may want to know."""


@dataclass(frozen=True)
class Piece:
    """How one of our parameters is cut out of one of their tensors."""

    source: str
    rows: tuple[int, int]
    size: tuple[int, ...]
    conv1d: bool = False
    interleaved_heads: int = 0

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """Our parameter, from the whole of their tensor."""
        tensor = (tensor.T if self.conv1d else tensor)[self.rows[0] : self.rows[1]]
        if self.interleaved_heads:
            # Rows 2j and 2j+1 of a head form a pair there; here rows j and j + head_dim/2 do.
            split = tensor.reshape(self.interleaved_heads, -1, 2, *tensor.shape[1:])
            tensor = split.transpose(1, 2).reshape(tensor.shape)
        return tensor


def pieces(plan: Plan, found: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Piece]:
    """One `Piece` for each parameter of `plan.shape`.

    `found` holds name → size of the checkpoint's tensors, `where` its name for messages. Raises
    `UserError` when a tensor is missing, has another size than the shape asks for, or belongs nowhere.
    """
    wanted = layout.sizes(plan.shape)
    of_source: dict[str, list[str]] = {}
    for name in _in_module_order(wanted, plan):
        of_source.setdefault(_their_name(name, plan), []).append(name)
    result: dict[str, Piece] = {}
    for source, names in of_source.items():
        if source not in found:
            raise UserError(f"{where}: tensor {shown(source)} is missing")
        conv1d = plan.conv1d and names[0].startswith("blocks.") and len(wanted[names[0]]) == 2
        height = sum(wanted[name][0] for name in names)
        whole = (height, *wanted[names[0]][1:])
        expected = whole[::-1] if conv1d else whole
        if found[source] != expected:
            raise UserError(
                f"{where}: tensor {shown(source)} is {_size(found[source])}; its config makes it {_size(expected)}"
            )
        start = 0
        for name in names:
            stop = start + wanted[name][0]
            result[name] = Piece(source, (start, stop), wanted[name], conv1d, _interleaved(name, plan))
            start = stop
    for source in found:
        if source not in of_source and not re.fullmatch(plan.ignored, source):
            raise UserError(
                f"{where}: tensor {shown(source)} has no place in this model; its config does not describe it"
            )
    return {name: result[name] for name in wanted}


def _in_module_order(wanted: Sizes, plan: Plan) -> list[str]:
    order = {module: k for k, module in enumerate(plan.modules)}
    return sorted(wanted, key=lambda name: order[_split(name)[0]])


def _split(name: str) -> tuple[str, int, str]:
    """`blocks.3.attention.query.bias` → (`blocks.{i}.attention.query`, 3, `bias`)."""
    module, _, kind = name.rpartition(".")
    match = re.fullmatch(r"blocks\.(\d+)\.(.*)", module)
    return (f"blocks.{{i}}.{match[2]}", int(match[1]), kind) if match else (module, 0, kind)


def _their_name(name: str, plan: Plan) -> str:
    module, i, kind = _split(name)
    theirs = plan.layers[i] if plan.layers else i
    return f"{plan.modules[module].format(i=theirs)}.{kind}"


def _interleaved(name: str, plan: Plan) -> int:
    module, i, _ = _split(name)
    layer = plan.shape.layers[i]
    heads = {"blocks.{i}.attention.query": layer.n_heads, "blocks.{i}.attention.key": layer.n_kv_heads}
    return heads.get(module, 0) if plan.interleaved else 0


def _size(size: tuple[int, ...]) -> str:
    return " × ".join(map(str, size)) or "a single number"
