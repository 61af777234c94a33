"""A family's tensors and our parameters: one map for each family, which import splits by and export joins by.

    tensors = list_tensors(names, shape)
    check(tensors, found, …)                # import: every tensor is there, has its size, and none is left over
    dict(tensors[0].split(theirs))          # import: our parameters, from one of their tensors
    tensors[0].join(ours)                   # export: their tensor, from our parameters

A family (`hf_families`, `gguf_families`) says which of its modules is which of ours and how it stores them; parameters,
sizes and tying come from `entasis.shape.layout`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from entasis.errors import UserError
from entasis.interop.config_reader import shorten
from entasis.shape import layout
from entasis.shape.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class NameMap:
    """Which of a family's modules is which of ours, and how it stores them.

    Several of ours that are one of theirs are its rows one after the other, in the order given here (a fused qkv is
    query, key, value).
    """

    outer: Mapping[str, str]
    """Our module → theirs, of those of no layer."""
    layer: str
    """What stands before the names of a layer, `{i}` being its number."""
    block: Mapping[str, str]
    """Our module → theirs, within a layer."""
    conv1d: bool = False
    """The matrices of the blocks are stored [in, out], as in GPT-2."""
    interleaved: bool = False
    """In query and key the two rows that rotate together are neighbours, as in GGUF's llama; in ours they are half a
    head apart."""
    ignored: str = r"(?!)"
    """Pattern of tensors that hold no parameters (buffers of old checkpoints)."""
    optional: str = ""
    """What some checkpoints leave out in front of these names, `ignored` expecting both."""

    def as_in(self, found: Container[str]) -> NameMap:
        """The names as a checkpoint with the tensors `found` has them: without `optional` where its embedding is."""
        embedding = f"{self.outer['embedding.tokens']}.weight"
        if embedding in found or embedding.removeprefix(self.optional) not in found:
            return self
        outer = {ours: theirs.removeprefix(self.optional) for ours, theirs in self.outer.items()}
        return replace(self, outer=outer, layer=self.layer.removeprefix(self.optional))


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a family's checkpoint, and our parameters that it holds: its rows, one after the other."""

    name: str
    size: tuple[int, ...]
    parameters: tuple[layout.Parameter, ...]
    transposed: bool = False
    head_dim: int | None = None
    """Where rows of query and key are interleaved within each head; None: they are not."""

    @property
    def count(self) -> int:
        return math.prod(self.size)

    def split(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of our parameters, views of their `tensor` where its rows stand as ours do."""
        rows = (tensor.T if self.transposed else tensor).split([p.size[0] for p in self.parameters])
        for parameter, part in zip(self.parameters, rows, strict=True):
            yield parameter.name, self._reorder(parameter, part, pairs_adjacent=True)

    def join(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Their tensor, from our parameters by name: the inverse of `split`."""
        parts = [self._reorder(p, tensors[p.name], pairs_adjacent=False) for p in self.parameters]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        return tensor.T if self.transposed else tensor

    def _reorder(
        self, parameter: layout.Parameter, rows: torch.Tensor, *, pairs_adjacent: bool
    ) -> torch.Tensor:
        """The rows [heads · head_dim, …] of each head from interleaved to half-split, or back."""
        if self.head_dim is None or parameter.role not in ("query", "key"):
            return rows
        half = self.head_dim // 2
        inner = (half, 2) if pairs_adjacent else (2, half)
        return rows.reshape(-1, *inner, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def list_tensors(names: NameMap, shape: ModelShape, layers: tuple[int, ...] = ()) -> list[StoredTensor]:
    """Every tensor of a family's checkpoint of this shape, in our order; a tied head is none of its own.

    `layers` are their indices of our layers, where they differ. Raises `UserError` for a parameter that the family has
    no name for.
    """
    held: dict[str, dict[str, layout.Parameter]] = {}
    for p in layout.parameters(shape):
        if p.shares is not None:
            continue
        module, _, kind = p.name.removeprefix(f"blocks.{p.layer}.").rpartition(".")
        modules, prefix = names.outer, ""
        if p.layer is not None:
            modules, prefix = names.block, names.layer.format(i=layers[p.layer] if layers else p.layer) + "."
        if module not in modules:
            raise UserError(f"{p.name} has no name in this family")
        held.setdefault(f"{prefix}{modules[module]}.{kind}", {})[module] = p
    result = []
    for name, of_module in held.items():
        parameters = [of_module[m] for m in (*names.outer, *names.block) if m in of_module]
        size = (sum(p.size[0] for p in parameters), *parameters[0].size[1:])
        transposed = names.conv1d and parameters[0].layer is not None and parameters[0].is_matrix
        head_dim = shape.head_dim if names.interleaved else None
        stored = size[::-1] if transposed else size
        result.append(StoredTensor(name, stored, tuple(parameters), transposed, head_dim))
    return result


def check(
    tensors: Iterable[StoredTensor], found: Mapping[str, tuple[int, ...]], where: str, ignored: str
) -> None:
    """Raises `UserError` when a tensor is missing from `found` (name → size), has another size, or belongs nowhere.

    `where` names the checkpoint in messages, `ignored` is a pattern of tensors that may be there too.
    """
    wanted = {tensor.name: tensor.size for tensor in tensors}
    for name, size in wanted.items():
        if name not in found:
            raise UserError(f"{where}: tensor {shorten(name)} is missing")
        if found[name] != size:
            raise UserError(
                f"{where}: tensor {shorten(name)} is {_format(found[name])}; its config makes it {_format(size)}"
            )
    for name in found:
        if name not in wanted and not re.fullmatch(ignored, name):
            raise UserError(
                f"{where}: tensor {shorten(name)} has no place in this model; its config does not describe it"
            )


def _format(size: tuple[int, ...]) -> str:
    return " × ".join(map(str, size)) or "a single number"
