"""A model's loss as compiled code, in which no layer may fall back to eager silently."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from entasis.model.transformer import Transformer
from entasis.train import parallel, sharding

T = TypeVar("T")


def compiled(
    model: Transformer, *, backend: str | Callable[..., Any] = "inductor", forget: bool = True
) -> Callable[..., torch.Tensor]:
    """The model's loss as one graph: `fullgraph` raises where a layer would fall back to eager.

    With several processes each block is a graph of its own, and the head: parameters are gathered, or gradients sent,
    between them. What was compiled before in this process is forgotten, unless `forget` is false.
    """
    # Dynamo counts recompiles by code object, and earlier models in this process share ours.
    if forget:
        torch._dynamo.reset()
    if parallel.world() > 1 or sharding.is_sharded(model):
        least = 8 if forget else torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(least, 2 * model.shape.distinct_layers)
        for part, name in (*((block, "forward") for block in model.blocks), (model, "head_loss")):
            eager = getattr(type(part), name).__get__(part)
            built = torch.compile(eager, fullgraph=True, dynamic=False, backend=backend)
            setattr(part, name, functools.partial(_where_it_learns, built, eager))
        return model.loss
    return torch.compile(model.loss, fullgraph=True, dynamic=False, backend=backend)


def _where_it_learns(built: Callable[..., T], eager: Callable[..., T], *args: Any, **options: Any) -> T:
    """Validation has batches of other sizes, for which nothing shall be built."""
    return (built if torch.is_grad_enabled() else eager)(*args, **options)
