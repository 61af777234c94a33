"""What a finished run leaves: weights, moments, the scores of its documents, and the numbers of `result.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from entasis import files
from entasis.evaluate.bits_per_byte import Score
from entasis.grow.provenance import PROVENANCE
from entasis.model import weights
from entasis.shape import cost
from entasis.train import metrics, moments, parallel, stages
from entasis.train.metrics import records
from entasis.train.stage_runner import StageRunner
from entasis.train.timeline import Timeline
from entasis.train.validation import Validation

RAW = "raw"
"""Of a run with averaged weights, the folder of those that were trained."""


def save_weights(folder: Path, runner: StageRunner, positions: dict[str, int]) -> dict[str, str | None]:
    """Writes weights and moments; hashes of the files, None where a file says itself what it holds.

    With an average the weights are the average's, and those that were trained lie in `raw/` with the moments, which are
    theirs. All ranks call it; only the main one writes and knows hashes.
    """
    hashes: dict[str, str | None] = {}
    raw = folder / RAW if runner.average is not None else folder
    model, found = runner.gathered(), runner.moments()
    if parallel.is_main():
        raw.mkdir(exist_ok=True)
        if raw != folder:
            tokenizer = (folder / weights.TOKENIZER).read_bytes()
            files.write_bytes(raw / weights.TOKENIZER, tokenizer, locked=True)
            files.write_json(raw / PROVENANCE, {"layers": runner.span.provenance()}, locked=True)
        weights.save(model, raw)
        moments.save(raw, found, positions)
        inside = raw.relative_to(folder)
        hashes[str(inside / weights.WEIGHTS)] = None
        hashes[str(inside / moments.OPTIMIZER)] = files.hash_of(raw / moments.OPTIMIZER)
    parallel.barrier()
    if raw != folder:
        with runner.averaged():
            model = runner.gathered()
            if parallel.is_main():
                weights.save(model, folder)
                hashes[weights.WEIGHTS] = None
            parallel.barrier()
    return hashes


def save_scores(folder: Path, score: Score) -> dict[str, str]:
    """Writes the score of every held-out document; the file's hash."""
    path = folder / "validation.safetensors"
    arrays = {name: torch.from_numpy(getattr(score, name).copy()) for name in Score.ARRAYS}
    with files.aside(path, need=sum(array.nbytes for array in arrays.values()), locked=True) as partial:
        save_file(arrays, partial)
    return {path.name: files.hash_of(path)}


def summarise(
    folder: Path, timeline: Timeline, environment: dict[str, Any], validation: Validation | None
) -> dict[str, Any]:
    """What was trained, what it cost and how good it is, from the run's metrics and its last `validation`."""
    rows, last = records(folder), timeline.spans[-1]

    def describe(span: stages.StageSpan) -> dict[str, Any]:
        found = next((r.get("validation_bits_per_byte") for r in rows if r["step"] == span.stop), None)
        return {
            **timeline.describe_stage(span),
            "tokens": span.tokens(span.stop) - span.tokens_before,
            "bits_per_byte": validation.overall.bits_per_byte if validation and span is last else found,
        }

    return {
        "parameters": cost.parameters(last.shape),
        "flops_per_token": stages.flops_per_token(timeline.spans),
        "stages": [describe(span) for span in timeline.spans],
        "tokens": last.tokens(last.stop),
        "steps": timeline.steps,
        "layers": last.provenance(),
        **timeline.describe_importance(),
        "validation": validation.result() if validation else None,
        "loss": sum(row["loss"] for row in rows[-10:]) / len(rows[-10:]),
        "seconds": sum(row["seconds"] for row in rows),
        "tokens_per_second": metrics.steady_median(rows, "tokens_per_second"),
        "mfu": metrics.steady_median(rows, "mfu"),
        "busy": environment.get("busy", False),
        "data_wait": metrics.steady_median(rows, "data_wait"),
        "peak_memory_bytes": max(row["memory_bytes"] for row in rows),
        **{k: environment[k] for k in ("device", "precision", "compile", "attention", "versions", "data")},
    }
