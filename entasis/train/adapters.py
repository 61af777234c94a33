"""LoRA phases: low-rank adapters (2106.09685) beside frozen matrices, by peft, merged into them where the model leaves the stage.

    stages:
    - {trainable: [final_norm, head], lora: {rank: 8, on: [attention, ffn]}, tokens: 1M}

peft wraps each matrix's module in place, so that parameters get its names: `….base_layer.weight` for the matrix,
`….lora_A.default.weight` and `….lora_B.default.weight` for the adapter (`entasis.shape.layout.adapters`). Those names stay
inside the stage: whoever asks for its whole model (validation, weights, the next stage) gets a copy with W + (alpha / rank)·B·A.
"""

from __future__ import annotations

import math

import torch

from entasis.model.initialisation import generator
from entasis.model.transformer import Transformer
from entasis.train.recipe import Lora

BASE = ".base_layer."
MOST_MOVED = 1e-5
"""Merging may move no fp32 logit by more than this, beside the largest logit or 1."""


def attach(model: Transformer, lora: Lora, matrices: list[str], seed: int) -> None:
    """Puts an adapter beside each of these matrices. A is drawn from the seed and its own name, B is zero."""
    # Takes seconds, so only here.
    from peft import LoraConfig, inject_adapter_in_model

    modules = [name.removesuffix(".weight") for name in matrices]
    scale = lora.rank if lora.alpha is None else lora.alpha
    config = LoraConfig(r=lora.rank, lora_alpha=scale, target_modules=modules, lora_dropout=0.0)
    inject_adapter_in_model(config, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                bound = 1 / math.sqrt(parameter.shape[1])
                drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator(seed, name))
                parameter.copy_(drawn)
            elif ".lora_B." in name:
                parameter.zero_()


def is_adapter(name: str) -> bool:
    """Whether a parameter of an adapted model is one of an adapter."""
    return ".lora_" in name


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether `attach` was called on the model."""
    return any(BASE in name for name, _ in model.named_parameters())


@torch.no_grad()
def merged(model: Transformer) -> Transformer:
    """A model without adapters that computes the same; what was not adapted shares its memory."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if name.endswith(f"{BASE}weight"):
            wrapped = model.get_submodule(name.partition(BASE)[0])
            change = wrapped.get_delta_weight("default")  # type: ignore[operator]
            tensors[name.replace(BASE, ".")] = parameter.detach() + change.to(parameter.dtype)
        elif not is_adapter(name):
            tensors[name.replace(BASE, ".")] = parameter.detach()
    with torch.device("meta"):
        plain = Transformer(model.shape, attention=model.attention)
    plain.load_state_dict(tensors, assign=True)
    return plain.train(model.training)


@torch.no_grad()
def moved(model: Transformer, tokens_BT: torch.Tensor) -> float:
    """The largest change of any fp32 logit that merging makes, beside the largest logit or 1."""
    before_BTV, after_BTV = (m(tokens_BT).float() for m in (model, merged(model)))
    return ((after_BTV - before_BTV).abs().max() / before_BTV.abs().max().clamp(min=1)).item()
