import json

import pytest

from entasis.cli import main
from entasis.train import environment


def test_the_machine_is_told_with_speeds_that_were_measured(capsys):
    assert main(["environment", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["flops_per_second"]["fp32"] > 1e8 and found["flops_per_second"]["bf16"] > 1e5
    assert found["extras"]["transformers"] and found["threads"] >= 1 and found["free_disk_bytes"] > 0
    assert main(["environment"]) == 0
    told = capsys.readouterr().out
    assert "GFLOP/s" in told and ("slow: " in told or "nothing here is slow" in told)


@pytest.mark.parametrize(
    ("planted", "says", "cure"),
    [
        ({"threads": 8}, "8 threads on 4 cores", "OMP_NUM_THREADS=4"),
        (
            {"threads": 1, "OMP_NUM_THREADS": "1"},
            "1 of 4 cores (OMP_NUM_THREADS is set)",
            "OMP_NUM_THREADS=4",
        ),
        ({"flops_per_second": {"fp32": 1e11, "bf16": 1e9}}, "bf16 makes 0.01", "precision=fp32"),
        ({"compiler": False}, "cannot be compiled", "g++"),
        ({"free_disk_bytes": 1 << 30}, "1.0 GiB are free on the disk", "free some"),
        ({"busy": True}, "other work", "wait"),
    ],
)
def test_what_is_slow_is_named_with_its_cure(planted, says, cure):
    sound = {
        "busy": False, "threads": 4, "cores": 4, "physical_cores": 4, "OMP_NUM_THREADS": None, "gpus": [],
        "flops_per_second": {"fp32": 1e11, "bf16": 2e11}, "compiler": True, "free_disk_bytes": 1 << 40,
        "free_memory_bytes": 1 << 40,
    }  # fmt: skip
    assert list(environment._what_is_slow(sound)) == []
    ((what, todo),) = environment._what_is_slow(sound | planted)
    assert says in what and cure in todo
