"""Initial values.

| parameter                                   | standard                 | mup (m = fan_in / base fan_in) |
|---------------------------------------------|--------------------------|--------------------------------|
| token embedding, position table             | N(0, 0.02²)              | N(0, 0.02²)                    |
| query, key, value, gate, up                 | N(0, 0.02²)              | N(0, 0.02² / m)                |
| attention.output, feedforward.down          | N(0, 0.02² / 2L)         | N(0, 0.02² / 2L / m)           |
| the same two, with `norm_scaling` or a      | N(0, 0.02²)              | N(0, 0.02² / m)                |
| `residual_scale` other than 1               |                          |                                |
| untied head                                 | N(0, 0.02²)              | N(0, 0.02²)                    |
| norm weights                                | 1                        | 1                              |
| biases                                      | 0                        | 0                              |

L is the number of layers; the factor 1/2L is GPT-2's. LayerNorm scaling replaces it (2502.05795, section 3).

Every parameter draws from a generator of its own, seeded by (seed, its name): a parameter of the same name and
shape has the same initial values in any two models, whatever the rest of them looks like. That pairs the arms of a
study.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn

from entasis.model import parametrisation as rules
from entasis.model.transformer import Transformer

STD = 0.02


@torch.no_grad()
def init_weights(
    model: Transformer, seed: int, *, parametrisation: str = "standard", base_width: int | None = None
) -> None:
    """Fills every parameter of `model` in place; drawn on the CPU in fp32, so the device does not matter."""
    described = rules.describe(model.shape, parametrisation, base_width=base_width)
    branch_scaled = model.shape.norm_scaling or model.shape.residual_scale != 1.0
    depth = 1.0 if branch_scaled else 1 / math.sqrt(2 * model.shape.n_layers)
    for name, parameter in model.named_parameters():
        rule = described[name]
        if rule.kind == "vector":
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = STD * rule.init * (depth if rule.writes else 1.0)
        parameter.copy_(_normal(parameter, seed, name) * std)


def _normal(parameter: nn.Parameter, seed: int, name: str) -> torch.Tensor:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(parameter.shape, generator=generator)
