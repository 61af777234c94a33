"""Shares of a model on several processes, killed and resumed on another number of them: the losses of one process."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from entasis.errors import UserError
from entasis.train import parallel, run_folder, sharding
from entasis.train.recipe import Parallel
from entasis.train.run import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told(corpora, tmp_path_factory):
    """What `worlds.py` measured of its runs."""
    answer = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("worlds.py"),
            tmp_path_factory.mktemp("worlds"),
            corpora / "train",
            corpora / "validation",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
        timeout=500,
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.xdist_group("worlds")
@pytest.mark.parametrize(
    "name",
    [
        "ddp on 4, then on 1",
        "one, then hsdp on 4",
        "fsdp on 4, then on 2",
        "fsdp on 2, then one",
    ],
)
def test_losses_and_weights_are_those_of_one_process(told, name):
    """Ranks add the same gradients in another order: measured differences are about 1e-6."""
    one, many = told["one"], told[name]
    assert many["steps"] == one["steps"] == list(range(1, 9))
    for key in ("losses", "norms", "bits_per_byte"):
        assert many[key] == pytest.approx(one[key], rel=1e-5)
    assert told["weights"][name] < 1e-5
    assert many["kept"] == one["kept"] == ["step-00000003", "step-00000006"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.xdist_group("worlds")
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
@pytest.mark.parametrize("name", ["muon", "stages"])
def test_muon_and_stages_work_on_several_processes(told, name, kind):
    """Muon orthogonalises whole matrices; a stage that trains some parameters leaves the rest where they are."""
    one, two = told[f"{name}, ddp on 1"], told[f"{name}, {kind} on 2"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-5)


def test_one_process_needs_no_group(recipe, tmp_path):
    """The same recipe on a laptop: nothing to share, the same losses to the bit."""
    assert (
        train(recipe(parallel={"kind": "fsdp"}), tmp_path / "a")["loss"]
        == (train(recipe(), tmp_path / "b")["loss"])
    )


def test_a_run_goes_on_under_another_kind(recipe, tmp_path):
    def begin(**changes):
        with contextlib.ExitStack() as held:
            return run_folder.open_run(recipe(**changes), tmp_path, torch.device("cpu"), held)

    begin()
    run = begin(parallel={"kind": "hsdp", "shard": 4})
    assert run.recipe.parallel == Parallel(kind="hsdp", shard=4)
    with pytest.raises(UserError, match="holds a run of another recipe"):
        begin(seed=1)


@pytest.mark.parametrize("how", [{"kind": "fsdp", "shard": 2}, {"kind": "hsdp", "shard": 0}])
def test_a_shard_that_means_nothing_is_refused(recipe, tmp_path, how):
    with pytest.raises(UserError, match=r"parallel\.shard is (2 under parallel\.kind|0; it must be)"):
        train(recipe(parallel=how), tmp_path)


def test_groups_that_do_not_divide_the_processes_are_refused(monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 8)
    with pytest.raises(UserError, match=r"parallel\.shard is 3, but 8 processes"):
        sharding.mesh(Parallel(kind="hsdp", shard=3), torch.device("cpu"))
