"""What a shape costs: parameters, FLOPs, KV cache, memory. Exact, layer by layer.

FLOPs are those of the matrix products, a multiply and an add counted as two, as `torch.utils.flop_counter` does.
Per token and layer, forward: two for every number in its matrices (`entasis.shape.layout`), and `4·s·h·k` for the
scores and their sum with h query heads, k the head width and s the attended length; the head adds `2·d·V`. Training is three times
forward: each product has two in the backward pass.

The attended length is the whole sequence by default ("full": what a plain product or flop_counter computes);
"causal" counts half of it, what a kernel that skips the masked half computes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from entasis.shape import layout
from entasis.shape.layout import Parameter
from entasis.shape.shapes import LayerShape, ModelShape

Attended = Literal["full", "causal"]
NO_ADAPTERS: Mapping[str, int] = MappingProxyType({})


def layer_parameters(shape: ModelShape, index: int) -> int:
    """Parameters of one layer: its matrices, biases and norms."""
    return layout.count_layer(shape, shape.layers[index])[0]


def parameters(shape: ModelShape) -> int:
    """All parameters, a tied embedding counted once."""
    outside = sum(p.count for p in layout.outer_parameters(shape) if p.shares is None)
    return outside + sum(layer_parameters(shape, i) for i in range(shape.n_layers))


def parameters_without_input_embedding(shape: ModelShape) -> int:
    """Parameters less the token table at the input; a tied table stays counted as the head."""
    tables = (p for p in layout.outer_parameters(shape) if p.role in ("embedding", "code"))
    return parameters(shape) - (0 if shape.tied_embeddings else sum(p.count for p in tables))


@dataclass(frozen=True)
class Counts:
    """Parameters by what becomes of them: `active` learn, `frozen` do not, `stored` are both together."""

    active: int
    frozen: int
    stored: int


def count_uses(
    shape: ModelShape, learning: Collection[str] | None = None, *, ranks: Mapping[str, int] = NO_ADAPTERS
) -> Counts:
    """The parameters where those named in `learning` learn; None is every one that can.

    A table that is computed from the id is none of them. `ranks` are those of LoRA adapters, by the matrix adapted.
    """
    learns = set(layout.learnable(shape) if learning is None else learning)
    beside = layout.adapters(shape, ranks)
    everything = [*(p for p in layout.parameters(shape) if p.shares is None), *beside]
    active = sum(p.count for p in everything if p.name in learns)
    stored = parameters(shape) + sum(p.count for p in beside)
    return Counts(active, stored - active, stored)


def layer_flops_per_token(
    shape: ModelShape,
    index: int,
    sequence: int = 1024,
    *,
    training: bool = True,
    attended: Attended = "full",
) -> float:
    """FLOPs per token of one layer at a sequence length."""
    layer = shape.layers[index]
    length = sequence if attended == "full" else sequence / 2
    matrices = layout.count_layer(shape, layer)[1]
    return (3 if training else 1) * (2 * matrices + 4 * length * layer.n_heads * shape.head_dim)


def flops_per_token(
    shape: ModelShape, sequence: int = 1024, *, training: bool = True, attended: Attended = "full"
) -> int:
    """FLOPs per token of the whole model at a sequence length, head included."""
    head = (3 if training else 1) * 2 * shape.d_model * shape.vocabulary
    layers = (
        layer_flops_per_token(shape, i, sequence, training=training, attended=attended)
        for i in range(shape.n_layers)
    )
    return round(head + sum(layers))


def stage_flops_per_token(
    shape: ModelShape,
    learning: Collection[str],
    sequence: int = 1024,
    *,
    attended: Attended = "full",
    ranks: Mapping[str, int] = NO_ADAPTERS,
) -> int:
    """Training FLOPs per token where only the parameters named in `learning` learn.

    Forward all of it; backward what is needed: a product's gradient by its weight where that learns, by its input where
    something in front of it learns. With everything learning that is `flops_per_token`. `ranks` are those of LoRA
    adapters, by the matrix adapted. Activation checkpointing's second forward pass is not counted.
    """
    length = sequence if attended == "full" else sequence // 2
    work = flops_per_token(shape, sequence, training=False, attended=attended)
    work += sum(2 * p.count for p in layout.adapters(shape, ranks))
    learns = set(learning)
    flows = any(p.name in learns for p in layout.outer_parameters(shape) if p.part == "embedding")
    for i in range(shape.n_layers):
        roles: dict[str, list[Parameter]] = {}
        for p in layout.layer_parameters(shape, i):
            roles.setdefault(p.role, []).append(p)
        for half in ("attention", "feedforward"):
            if f"{half}_norm" in roles:
                more, flows = _backward_of_half(shape, i, half, roles, learns, flows, length, ranks)
                work += more
    head = next(p for p in layout.outer_parameters(shape) if p.role == "head" and not p.is_bias)
    flows |= any(p.name in learns for p in layout.outer_parameters(shape) if p.part == "final_norm")
    return work + 2 * head.count * (flows + ((head.shares or head.name) in learns))


def _backward_of_half(
    shape: ModelShape,
    index: int,
    half: str,
    roles: Mapping[str, Sequence[Parameter]],
    learns: Collection[str],
    flows: bool,
    length: int,
    ranks: Mapping[str, int],
) -> tuple[int, bool]:
    """(backward FLOPs per token of a layer's attention or FFN, whether gradients flow into the stream behind it).

    `flows` says whether they flow into the stream in front of it.
    """
    work = 0

    def through(role: str, reads: bool) -> bool:
        """Passes one projection; `reads` is whether its input has a gradient."""
        nonlocal work
        adapted = False
        for p in roles[role]:
            if p.is_matrix:
                work += 2 * p.count * (reads + (p.name in learns))
            if rank := ranks.get(p.name):
                # A and B learn, so the gradient between them is needed; that of A's input where it flows on.
                wide, narrow = rank * p.size[0], rank * p.size[1]
                work += 2 * (2 * wide + narrow * (1 + reads))
                adapted = True
        return reads or adapted or any(p.name in learns for p in roles[role])

    def learn(role: str) -> bool:
        return any(p.name in learns for p in roles.get(role, ()))

    is_pre = shape.norm_placement == "pre"
    reads = flows or (is_pre and learn(f"{half}_norm"))
    if half == "attention":
        query = through("query", reads) or learn("query_norm")
        key = through("key", reads) or learn("key_norm")
        value = through("value", reads)
        scores = 2 * length * shape.layers[index].n_heads * shape.head_dim
        out = query or key or value
        # The backward pass of attention itself is one piece: it gives the gradients of all three.
        work += 4 * scores * out
        out = through("attention_output", out)
    else:
        out = False
        for role, axes in layout.ffn_kind(shape, shape.layers[index]).matrices:
            out |= through(role, reads if axes[-1] == "residual" else out)
    return work, flows or out or (not is_pre and learn(f"{half}_norm"))


def kv_bytes_per_token(shape: ModelShape, bytes_per_element: int = 2) -> int:
    """Bytes of keys and values that one token leaves in the cache (16-bit elements by default)."""
    return sum(2 * layer.n_kv_heads * shape.head_dim * bytes_per_element for layer in shape.layers)


@dataclass(frozen=True)
class Memory:
    """Bytes held through training: fp32 weights, and of what learns gradients and AdamW's two moments."""

    weights: int
    gradients: int
    optimizer: int


def training_memory(
    shape: ModelShape, learning: Collection[str] | None = None, *, ranks: Mapping[str, int] = NO_ADAPTERS
) -> Memory:
    """Memory of weights, gradients and optimizer; activations are not in it. `learning` and `ranks` as in `count_uses`."""
    counts = count_uses(shape, learning, ranks=ranks)
    return Memory(weights=4 * counts.stored, gradients=4 * counts.active, optimizer=8 * counts.active)


def mean_layer(shape: ModelShape) -> LayerShape:
    """The layer of mean widths, rounded: for messages, not for building."""
    n = shape.n_layers
    return LayerShape(
        round(sum(x.n_heads for x in shape.layers) / n),
        round(sum(x.n_kv_heads for x in shape.layers) / n),
        round(sum(x.d_ff for x in shape.layers) / n),
    )
