"""SIGKILL anywhere, saves included, and a full disk: the same losses to the bit afterwards."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from entasis.errors import Failure
from entasis.train import checkpoint
from entasis.train.metrics import records
from entasis.train.run import train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "points"),
    [
        *(("plain", 8), ("staged", 8), ("constructive", 5), ("predicted", 3)),
        *(
            pytest.param(kind, 24, marks=pytest.mark.attack)
            for kind in ("plain", "staged", "constructive", "predicted")
        ),
    ],
)
def test_killed_anywhere_resumes_to_the_same_losses(corpora, tmp_path, kind, points):
    script = Path(__file__).with_name("killing.py")
    answer = subprocess.run(
        [sys.executable, script, tmp_path, corpora / "train", corpora / "validation", str(points), "7", kind],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    assert len(told["losses"]) == 10
    assert len(told["outcomes"]) == points
    assert all(outcome["died"] for outcome in told["outcomes"])
    assert [o["point"] for o in told["outcomes"] if not o["same"]] == []
    # The points were not all outside of saves.
    assert any(name.endswith(".partial") for outcome in told["outcomes"] for name in outcome["left"])
    # keep_last 2 of every 2 steps and of the ends of stages, keep_every 4.
    assert told["checkpoints"] == [4, 8, 10]


def test_unmarked_checkpoints_are_skipped(recipe, tmp_path):
    train(recipe(checkpoint={"every": 2, "keep_last": 3}), tmp_path)
    assert [checkpoint.step_of(path) for path in checkpoint.folders(tmp_path)] == [4, 6, 8]
    (tmp_path / "checkpoints" / "step-00000008" / "complete").unlink()
    assert [checkpoint.step_of(path) for path in checkpoint.folders(tmp_path)] == [4, 6]


def test_full_disk_fails_in_one_line_and_keeps_what_was_whole(recipe, tmp_path, monkeypatch):
    train(recipe(), tmp_path / "whole")
    settings = {"checkpoint": {"every": 2}}
    events = []
    real = os.fsync

    def fsync(descriptor):
        if events[-1]["step"] == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor)

    def report(event):
        events.append(event)
        os.fsync = fsync if event["event"] == "step" else real

    monkeypatch.setattr(os, "fsync", real)  # put back whatever happens
    with pytest.raises(Failure, match=r"no space left on the disk .* goes on from step 4"):
        train(recipe(**settings), tmp_path / "run", reporter=report)
    monkeypatch.undo()
    assert [checkpoint.step_of(path) for path in checkpoint.folders(tmp_path / "run")] == [2, 4]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))
    train(recipe(**settings), tmp_path / "run")
    assert [r["loss"] for r in records(tmp_path / "run")] == [r["loss"] for r in records(tmp_path / "whole")]


def test_kept_checkpoints_hold_readable_weights(recipe, tmp_path):
    for every in (2, 3, None):
        folder = tmp_path / str(every)
        train(recipe(checkpoint={"every": every, "keep_last": 1, "keep_every": 4}), folder)
        kept = [
            (checkpoint.step_of(f), (f / "model.safetensors").exists()) for f in checkpoint.folders(folder)
        ]
        assert kept == [(4, True), (8, True)]
