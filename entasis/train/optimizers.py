"""Optimizers and their parameter groups.

| parameters                       | adamw | muon  | weight decay |
|----------------------------------|-------|-------|--------------|
| hidden matrices (in the blocks)  | AdamW | Muon  | yes          |
| untied output head               | AdamW | AdamW | yes          |
| token and position embeddings    | AdamW | AdamW | no           |
| vectors (norms, biases)          | AdamW | AdamW | no           |
| adapters of a LoRA phase         | AdamW | AdamW | no           |

A tied embedding counts as an embedding. Under muP each hidden matrix has its own learning rate and weight
decay, by its own fan-in and under Muon its fan-out (`entasis.model.parametrisation`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from entasis.model import parametrisation
from entasis.model.transformer import Transformer
from entasis.train.muon import Muon
from entasis.train.recipe import Optimizer


def build(
    model: Transformer,
    recipe: Optimizer,
    trainable: list[str],
    *,
    precision: str = "fp32",
    apart: Mapping[str, Hashable] | None = None,
) -> list[torch.optim.Optimizer]:
    """The optimizers of the parameters named in `trainable`; each group has its `initial_lr` for the schedule.

    Muon scales its update to AdamW's root mean square, so that one learning rate serves both; it orthogonalises in
    the recipe's `precision`. Parameters with different labels in `apart` are in different groups.
    """
    parameters = dict(model.named_parameters())
    factors = parametrisation.describe(
        model.shape, recipe.parametrisation, base_width=recipe.base_width, muon=recipe.name == "muon"
    )
    gathered: dict[tuple[str, float, float, Hashable], list[nn.Parameter]] = defaultdict(list)
    for name in trainable:
        # LoRA's adapters are no parameters of the shape: AdamW at the recipe's rate, without decay.
        own, parameter = factors.get(name, parametrisation.Factors("vector")), parameters[name]
        hidden = own.kind == "hidden"
        decays = hidden or own.kind == "head"
        key = (
            "muon" if hidden and recipe.name == "muon" else "adamw",
            recipe.lr * own.lr,
            recipe.weight_decay * own.weight_decay if decays else 0.0,
            (apart or {}).get(name),
        )
        gathered[key].append(parameter)
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (kind, lr, decay, _), members in gathered.items():
        groups[kind].append({"params": members, "lr": lr, "initial_lr": lr, "weight_decay": decay})
    total = sum(p.numel() for kind in groups.values() for group in kind for p in group["params"])
    assert total == sum(parameters[name].numel() for name in trainable), (
        "a parameter is in no group or in two"
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    result: list[torch.optim.Optimizer] = []
    if groups["adamw"]:
        result.append(
            torch.optim.AdamW(groups["adamw"], lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)
        )
    if groups["muon"]:
        result.append(Muon(groups["muon"], lr=recipe.lr, dtype=dtype))
    return result


def update(
    parameters: Iterable[nn.Parameter],
    optimizers: Iterable[torch.optim.Optimizer],
    *,
    max_grad_norm: float | None,
    norm: torch.Tensor | None = None,
) -> None:
    """Clips the gradients to `max_grad_norm`, steps the optimizers and clears the gradients.

    `norm` is that of all gradients together, where it is known already.
    """
    trained, optimizers = [p for p in parameters if p.grad is not None], list(optimizers)
    if max_grad_norm is not None:
        if norm is None:
            norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        nn.utils.clip_grads_with_norm_(trained, max_grad_norm, norm)
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
