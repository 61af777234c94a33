"""A model's loss as compiled code, in which no layer may fall back to eager silently."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from entasis.model.transformer import Transformer
from entasis.train import parallel, sharding


def compiled(
    model: Transformer, *, backend: str | Callable[..., Any] = "inductor", forget: bool = True
) -> Callable[..., torch.Tensor]:
    """The model's loss as one graph: `fullgraph` raises where a layer would fall back to eager.

    With several processes each part is a graph of its own: parameters are gathered, or gradients sent, between them.
    What was compiled before in this process is forgotten, unless `forget` is false.
    """
    # Dynamo counts recompiles by code object, and earlier models in this process share ours.
    if forget:
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 8
    model.rotation(0, 1, model.norm.weight.device)  # what it keeps is there before anything is compiled
    if parallel.world() == 1 and not sharding.is_sharded(model):
        return torch.compile(model.loss, fullgraph=True, dynamic=False, backend=backend)
    compile_parts(model, backend=backend)
    return model.loss


def compile_parts(model: Transformer, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compiles each block, and the head with its loss, as a graph of its own; equal blocks share one."""
    # Of one shape there may be frozen and trained layers, with and without activation checkpointing.
    limit = max(torch._dynamo.config.recompile_limit, 8 * model.shape.distinct_layers)
    torch._dynamo.config.recompile_limit = limit
    for block in model.blocks:
        if block.norm_scale is not None:
            # A number would be a constant of the graph, and each layer would need its own.
            block.norm_scale = torch.as_tensor(
                block.norm_scale, dtype=torch.float64, device=model.norm.weight.device
            )
    for part in (*model.blocks, model.head):
        part.compile(fullgraph=True, dynamic=False, backend=backend)


def eager(when: bool = True) -> contextlib.AbstractContextManager[object]:
    """Within it compiled parts run eagerly and nothing is compiled, as for batches of other sizes; idle unless `when`."""
    return torch.compiler.set_stance("force_eager") if when else contextlib.nullcontext()
