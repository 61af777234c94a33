"""Rotary positions as others write them: `rope_theta` and `rope_scaling` of a `ModelShape`.

The base and the factors are held to numbers that positions can be turned by: from 1 on, as transformers asks too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from entasis.errors import UserError
from entasis.interop.config_reader import ConfigReader, shorten

if TYPE_CHECKING:
    from entasis.interop.gguf_reader import GGUFFile


def read_config(config: ConfigReader) -> dict[str, Any]:
    """From a Hugging Face config.

    transformers up to 4 keeps `rope_theta` and `rope_scaling` apart, 5 keeps both in `rope_parameters`; where both
    mappings are there, every version goes by `rope_scaling`.
    linear and llama3 scaling are what our models do; any other kind is refused by its name.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    asked = config.mapping(key) or {}
    scaling = ConfigReader(asked, f"{config.where}: {key}")
    theta = scaling.number("rope_theta", config.number("rope_theta", 10_000.0, least=1), least=1)
    if scaling.number("partial_rotary_factor", 1) != 1:
        raise scaling.refuse("partial_rotary_factor", "only rotating the whole head is supported")
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind == "linear":
        numbers: dict[str, Any] = {"factor": scaling.number("factor", least=1)}
        return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **numbers}}
    if kind == "llama3":
        numbers = {"factor": scaling.number("factor", least=1)}
        low = scaling.number("low_freq_factor", least=1e-3)
        numbers |= {"low_freq_factor": low, "high_freq_factor": scaling.number("high_freq_factor", least=low)}
        if numbers["high_freq_factor"] == low:
            raise scaling.refuse("high_freq_factor", "it must be above low_freq_factor")
        key = "original_max_position_embeddings"
        if not (original := scaling.integer(key)):
            raise scaling.wrong(key, original, "at least 1")
        return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **numbers, key: original}}
    raise UserError(
        f"{config.where}: rope scaling {shorten(kind)!r} is not supported; default, linear and llama3 are"
    )


def read_gguf(file: GGUFFile, settings: ConfigReader, head_dim: int) -> dict[str, Any]:
    """From the keys of a GGUF file, and its tensor `rope_freqs.weight` where llama3's scaling is in it."""
    theta = settings.number("rope.freq_base", 10_000.0, least=1)
    kind = settings.text("rope.scaling.type", "none")
    if kind == "linear":
        factor = settings.number("rope.scaling.factor", least=1)
        return {"rope_theta": theta, "rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind not in ("none", ""):
        raise settings.refuse("rope.scaling.type", "none, linear and llama3's factors are supported")
    if "rope_freqs.weight" not in file.tensors:
        return {"rope_theta": theta}
    if file.tensors["rope_freqs.weight"].size != (head_dim // 2,):
        raise UserError(f"{file.path.name}: tensor rope_freqs.weight is not {head_dim // 2} numbers")
    return {"rope_theta": theta, "rope_scaling": _llama3(file, theta)}


def _llama3(file: GGUFFile, theta: float) -> dict[str, Any]:
    """The llama3 scaling whose divisors of the frequencies `rope_freqs.weight` holds.

    The file keeps only the divisors: 1 for short waves, `factor` for long ones, a blend between. With
    Llama 3's own low and high factors (1 and 4) the blended ones tell the original context.
    """
    divisors = file.read("rope_freqs.weight").double()
    factor, low, high = float(divisors.max()), 1.0, 4.0
    exponents = torch.arange(len(divisors), dtype=torch.float64) / len(divisors)
    waves = 2 * math.pi * theta**exponents
    blended = (divisors > 1.001) & (divisors < factor * 0.999)
    original = 8192.0
    if factor > 1 and blended.any():
        share = (1 / divisors[blended] - 1 / factor) / (1 - 1 / factor)
        original = float((waves[blended] * (low + share * (high - low))).median())
    share = ((original / waves - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(1 / ((1 - share) / factor + share), divisors, rtol=1e-3):
        raise UserError(f"{file.path.name}: rope_freqs.weight is not llama3's scaling; no other is supported")
    numbers = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return {"rope_type": "llama3", **numbers, "original_max_position_embeddings": round(original)}
