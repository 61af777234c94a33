"""Data order and losses at several world sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from entasis.data.order import Order
from entasis.train import parallel
from entasis.train.journal import records
from entasis.train.loop import train
from entasis.train.recipe import to_yaml


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_read_the_same_order(world):
    order, sequences = Order(101, seed=3), 8
    for step in range(30):
        expected = list(order.indices(step * sequences, sequences))
        read = []
        for rank in range(world):
            read += list(
                order.indices(*parallel.slice_of(step * sequences, sequences, rank=rank, world=world))
            )
        assert read == expected


@pytest.mark.slow
def test_two_processes_train_as_one(recipe, tmp_path):
    """Equal within rounding: two ranks add the same gradients in another order."""
    train(recipe(), tmp_path / "one")
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe()))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [
        "-m",
        "entasis",
        "train",
        str(tmp_path / "recipe.yaml"),
        "--output",
        str(tmp_path / "two"),
        "--json",
    ]
    answer = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    one, two = (
        [(r["loss"], r["gradient_norm"]) for r in records(tmp_path / name)] for name in ("one", "two")
    )
    assert [x for pair in one for x in pair] == pytest.approx([x for pair in two for x in pair], rel=1e-4)
    assert answer.stdout.count('"bits_per_byte"') == 1
