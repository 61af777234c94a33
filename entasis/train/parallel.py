"""Data parallelism: one process a device, started by `torchrun`; without it, all of this is idle.

    torchrun --nproc 2 -m entasis train recipes/tiny.yaml --output runs/tiny

Every rank takes its slice of each batch. It holds the whole model and sums gradients with the others, unless the recipe
has the model shared out (`entasis.train.sharding`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

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


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Adds every gradient over all ranks, in place."""
    if world() == 1:
        return
    pending = [dist.all_reduce(p.grad, async_op=True) for p in parameters if p.grad is not None]
    for work in pending:
        work.wait()


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Adds a tensor over all ranks, in place; returns it."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def agree(value: T) -> T:
    """Rank 0's value, on every rank: what is measured or read from disk must be the same everywhere."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def is_main_process() -> bool:
    """Whether this process would be rank 0, also outside the process group."""
    return os.environ.get("RANK", "0") == "0"
