"""Continuing a text, one token at a time, each token read once (KV cache)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch

from entasis.errors import UserError
from entasis.model.cache import KVCache
from entasis.model.transformer import Transformer
from entasis.shape.cost import kv_bytes_per_token


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest; the filters apply in the order given."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be a number from 0 on")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; it must be from 0 to {2**63 - 1}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k is {self.top_k}; it must be at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name.replace('_', '-')} is {value}; it must be above 0 and at most 1")


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated."""
    if device.type == "cuda":
        # What torch holds and does not use is free to it.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return psutil.virtual_memory().available


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """Step by step, the next id of each prompt; None for one that has met an id of `stop`.

    Prompts of unequal length are read side by side up to the shortest, and the longer ones then go on reading
    while the shorter ones already write. A prompt's continuation does not depend on its neighbours when choosing
    greedily. Raises `UserError` for an empty prompt or one that leaves no room in a learned position table,
    and for more keys and values than there is memory for.
    """
    sampling = sampling or Sampling()
    if not prompts or any(not p for p in prompts):
        raise UserError("a prompt is empty; give at least one token")
    longest = max(map(len, prompts)) + tokens
    if model.shape.positions == "learned" and longest > model.shape.context:
        raise UserError(
            f"prompt and continuation are {longest} tokens; the model has positions for {model.shape.context}"
        )
    weight = model.norm.weight
    device, dtype = weight.device, weight.dtype
    needed = len(prompts) * longest * kv_bytes_per_token(model.shape, dtype.itemsize)
    if needed > (free := free_memory(device)):
        raise UserError(
            f"prompt and continuation are {longest:,} tokens; their keys and values take {needed / 2**30:,.1f} GiB, "
            f"{free / 2**30:,.1f} GiB are free"
        )
    return _continue(model, prompts, longest, tokens, sampling, stop)


@torch.inference_mode()
def _continue(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    longest: int,
    tokens: int,
    sampling: Sampling,
    stop: Collection[int],
) -> Iterator[list[int | None]]:
    weight = model.norm.weight
    device = weight.device
    cache = KVCache(model.shape, len(prompts), longest, dtype=weight.dtype, device=device)
    generator = torch.Generator(device).manual_seed(sampling.seed)
    shortest = min(map(len, prompts))
    ids_BT = torch.tensor([list(p[:shortest]) for p in prompts], device=device)
    written, finished = [0] * len(prompts), [False] * len(prompts)
    position = shortest
    while not all(finished):
        logits_BV = model.head_logits(model.hidden(ids_BT, cache=cache)[:, -1]).float()
        chosen = choose(logits_BV, sampling, generator).tolist()
        step: list[int | None] = []
        for b, prompt in enumerate(prompts):
            if position < len(prompt):  # still reading
                chosen[b] = prompt[position]
                step.append(None)
            elif finished[b]:
                step.append(None)
            else:
                written[b] += 1
                finished[b] = written[b] >= tokens or chosen[b] in stop
                step.append(None if chosen[b] in stop else chosen[b])
        if any(x is not None for x in step):
            yield step
        ids_BT = torch.tensor(chosen, device=device)[:, None]
        position += 1


def choose(logits_BV: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """The next ids [B] from fp32 logits [B, V]."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    # The largest is 0, so that no temperature, however small, divides to an infinity with a sign.
    coldest = torch.finfo(logits_BV.dtype).tiny
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / max(sampling.temperature, coldest)
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        lowest_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < lowest_B1, float("-inf"))
    if sampling.top_p is not None:
        sorted_BV, order_BV = logits_BV.sort(descending=True)
        # A token stays while what comes before it is still short of top_p, so the likeliest always stays.
        before_BV = sorted_BV.softmax(-1).cumsum(-1) - sorted_BV.softmax(-1)
        drop_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(
            1, order_BV, before_BV >= sampling.top_p
        )
        logits_BV = logits_BV.masked_fill(drop_BV, float("-inf"))
    probabilities_BV = logits_BV.softmax(-1)
    if sampling.min_p is not None:
        least_B1 = sampling.min_p * probabilities_BV.max(-1, keepdim=True).values
        probabilities_BV = probabilities_BV.masked_fill(probabilities_BV < least_B1, 0.0)
    return torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]
