"""Data parallelism: one process a device, started by `torchrun`. One process alone needs no process group.

    torchrun --nproc-per-node 2 -m entasis train tiny --output runs/tiny

Every rank takes its slice of each batch. It holds the whole model and sums gradients with the others, unless the recipe
shards the model (`entasis.train.sharding`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from entasis.errors import UserError

T = TypeVar("T")


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Joins the process group that `torchrun` announces in the environment, and leaves it at the end."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def slice_of(position: int, sequences: int, *, rank: int, world: int) -> tuple[int, int]:
    """(start, count): the global positions of one step that one rank reads.

    A step takes `sequences` positions from `position`; rank r takes the r-th of `world` equal runs, so all
    ranks together read the same sequences at any world size.
    """
    each = sequences // world
    return position + rank * each, each


AT_ONCE = 25 << 20
"""Bytes of gradients sent together, as in torch's DDP: a sum over many ranks has a price whatever its size."""


class GradientSum:
    """Sums gradients over all ranks while the backward pass runs: one all-reduce for every 25 MB of finished gradients.

    Ranks run the same graph, so their all-reduces come in the same order. With one process no hook is registered.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], *, at_once: int = AT_ONCE) -> None:
        self.sending = False
        """Whether the next backward pass is the last of its step: gradients of earlier micro-batches are accumulated locally."""
        self._at_once = at_once
        self._waiting: list[torch.Tensor] = []
        self._under_way: list[tuple[dist.Work, torch.Tensor, list[torch.Tensor]]] = []
        self._hooks = (
            [p.register_post_accumulate_grad_hook(self._collect) for p in parameters] if world() > 1 else []
        )

    def _collect(self, p: torch.Tensor) -> None:
        if self.sending:
            self._waiting.append(p)
            if sum(p.nbytes for p in self._waiting) >= self._at_once:
                self._send()

    def _send(self) -> None:
        together = torch.cat([p.grad.flatten() for p in self._waiting if p.grad is not None])
        work = dist.all_reduce(together, async_op=True)
        assert work is not None
        self._under_way.append((work, together, self._waiting))
        self._waiting = []

    def wait(self) -> None:
        """Waits for the all-reduces; afterwards every gradient is the sum over ranks."""
        if self._waiting:
            self._send()
        for work, together, parameters in self._under_way:
            work.wait()
            for p, grad in zip(parameters, together.split([p.numel() for p in parameters]), strict=True):
                p.grad = grad.view_as(p)
        self._under_way.clear()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Adds a tensor over all ranks, in place; returns it."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def broadcast_object(value: T) -> T:
    """Rank 0's value, on every rank: what is measured or read from disk must be the same everywhere."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def on_main(function: Callable[[], T]) -> T:
    """What `function` gives on rank 0, on every rank; what it raises for the user, on every rank too, where rank 0 tells it."""
    answer: tuple[T | None, UserError | None] = (None, None)
    if is_main():
        try:
            answer = function(), None
        except UserError as refusal:
            answer = None, refusal
    value, error = broadcast_object(answer)
    if error is not None:
        error.told_elsewhere = not is_main()
        raise error
    return value  # type: ignore[return-value]


def is_main_process() -> bool:
    """Whether this process would be rank 0, also outside the process group."""
    return os.environ.get("RANK", "0") == "0"
