"""Batches read ahead of the step that needs them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from entasis.data.mixture import Mixture
from entasis.train import parallel

_AHEAD = 3


@dataclass(frozen=True)
class Batch:
    """One rank's sequences of one step, and how long the step had to wait for them."""

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    ids_BT: torch.Tensor | None
    windows: np.ndarray
    """Numbers of the sequences in the mixture."""
    waited: float


def load_batches(
    mixture: Mixture,
    *,
    position: int,
    sequences: int,
    steps: int,
    device: torch.device,
    document_masking: bool,
) -> Iterator[Batch]:
    """`steps` batches of this rank from the mixture's `position`, read by a thread ahead of their use."""

    def read(step: int) -> tuple[np.ndarray, list[torch.Tensor]]:
        start, count = parallel.slice_of(
            position + step * sequences, sequences, rank=parallel.rank(), world=parallel.world()
        )
        chosen = mixture.windows(start, count)
        rows = [torch.from_numpy(mixture.batch(chosen))]
        if document_masking:
            rows.append(torch.from_numpy(mixture.document_ids(chosen)))
        return chosen, [x.pin_memory() for x in rows] if device.type == "cuda" else rows

    with ThreadPoolExecutor(1, thread_name_prefix="dataloader") as pool:
        pending: deque[Future[tuple[np.ndarray, list[torch.Tensor]]]] = deque(
            pool.submit(read, i) for i in range(min(_AHEAD, steps))
        )
        for step in range(steps):
            begun = time.perf_counter()
            chosen, rows = pending.popleft().result()
            waited = time.perf_counter() - begun
            if step + _AHEAD < steps:
                pending.append(pool.submit(read, step + _AHEAD))
            rows = [x.to(device, non_blocking=True) for x in rows]
            ids_BT = rows[1][:, : rows[0].shape[1] - 1] if document_masking else None
            tokens_BT, targets_BT = rows[0][:, :-1].contiguous(), rows[0][:, 1:].contiguous()
            yield Batch(tokens_BT, targets_BT, ids_BT, chosen, waited)
