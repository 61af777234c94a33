"""Data order and losses at several world sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from entasis.data.sampler import Sampler
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape.specification import resolve
from entasis.train import parallel
from entasis.train.compilation import compiled
from entasis.train.metrics import records
from entasis.train.recipe import to_yaml
from entasis.train.run import train


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_read_the_same_order(world):
    sampler, sequences = Sampler(101, seed=3), 8
    for step in range(30):
        expected = list(sampler.indices(step * sequences, sequences))
        read = []
        for rank in range(world):
            read += list(
                sampler.indices(*parallel.slice_of(step * sequences, sequences, rank=rank, world=world))
            )
        assert read == expected


@pytest.mark.parametrize("compile", [False, True])
def test_gradients_are_sent_while_the_backward_pass_runs(recipe, tmp_path, monkeypatch, compile):
    model = Transformer(resolve(recipe().shape).shape)
    init_weights(model, 0)
    learning, tokens = list(model.parameters()), torch.randint(64, (2, 32))
    there, send = [], dist.all_reduce

    def watched(grad, **options):
        there.append(sum(p.grad is not None for p in learning))
        return send(grad, **options)

    monkeypatch.setattr(dist, "all_reduce", watched)
    monkeypatch.setattr(parallel, "world", lambda: 2)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        loss_of = compiled(model, backend="aot_eager") if compile else model.loss
        gradients = parallel.GradientSum(learning, at_once=4096)
        loss_of(tokens, tokens).backward()
        expected = [p.grad for p in learning]
        assert not there, "a micro-batch before the last one stays at home"
        gradients.sending = True
        model.zero_grad(set_to_none=True)
        loss_of(tokens, tokens).backward()
        gradients.wait()
        gradients.close()
    finally:
        dist.destroy_process_group()
    assert 3 <= len(there) < len(learning) and there == sorted(there)
    assert there[0] <= len(learning) / 4, "the first are on their way before most are made"
    for p, alone in zip(learning, expected, strict=True):
        assert torch.equal(p.grad, alone), "a sum over one rank is itself, and back in its place"


def test_one_process_needs_no_group(recipe, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("a process group")

    for name in ("init_process_group", "all_reduce", "broadcast_object_list"):
        monkeypatch.setattr(dist, name, refused)
    joined = []
    train(recipe(), tmp_path / "run", reporter=lambda event: joined.append(dist.is_initialized()))
    assert joined and not any(joined)
    # Under torchrun a single process trains alone too.
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    train(recipe(), tmp_path / "torchrun")
    assert [r["loss"] for r in records(tmp_path / "run")] == [
        r["loss"] for r in records(tmp_path / "torchrun")
    ]


@pytest.mark.slow
def test_two_processes_train_as_one(recipe, tmp_path):
    """Equal within rounding: two ranks add the same gradients in another order."""
    # Adam's first steps divide a gradient by its own size: one that is zero but for rounding moves its weight by up to lr
    # either way. A larger eps leaves only the differences that matter.
    wanted = recipe(tokens=512 * 10, optimizer={"lr": 1e-2, "eps": 1e-5})
    train(wanted, tmp_path / "one")
    (tmp_path / "recipe.yaml").write_text(to_yaml(wanted))
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
    one, two = (records(tmp_path / name) for name in ("one", "two"))
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-6)
    assert [r["gradient_norm"] for r in one] == pytest.approx([r["gradient_norm"] for r in two], rel=1e-4)
    assert json.loads(answer.stdout)["steps"] == 10, "one process speaks"
