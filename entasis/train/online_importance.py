"""Importance of layers, measured while a run is under way, for a training plan that asks for it."""

from __future__ import annotations

import torch

from entasis.grow import layer_importance
from entasis.train import parallel
from entasis.train.stage_runner import StageRunner
from entasis.train.training_data import TrainingData
from entasis.train.training_plans.plan import Measurement, sequences_read


def measure_importance(
    runner: StageRunner, data: TrainingData, position: int, wanted: Measurement
) -> list[float]:
    """One number for each layer, on the sequences that the stage would read from `position` on. All ranks call it.

    Every rank reads all of them, so that the numbers do not depend on how many there are.
    """
    windows = data.mixture.windows(position, sequences_read(wanted, data.mixture.parts[0].dataset.sequence))
    model, batches = runner.gathered(), []
    for start in range(0, len(windows), runner.micro):
        chosen = windows[start : start + runner.micro]
        rows_BT = torch.from_numpy(data.mixture.batch(chosen)).to(runner.device)
        ids_BT = None
        if runner.span.data.document_masking:
            ids_BT = torch.from_numpy(data.mixture.document_ids(chosen)).to(runner.device)[:, :-1]
        batches.append((rows_BT[:, :-1].contiguous(), rows_BT[:, 1:].contiguous(), ids_BT))
    autocast = torch.autocast(runner.device.type, torch.bfloat16, enabled=runner.autocast is not None)
    with runner.eager(), autocast:
        return parallel.broadcast_object(layer_importance.MEASURES[wanted.measure](model, batches))
