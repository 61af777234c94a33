"""A training run keeps the memory it has freed instead of asking the system for it again."""

import itertools
import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys
from pathlib import Path
from entasis.train.run import train
from entasis.train.recipe import from_dict

faults = []
train(from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), reporter=lambda event: faults.append(
    resource.getrusage(resource.RUSAGE_SELF).ru_minflt) if event["event"] == "step" else None)
print(json.dumps(faults))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library is not glibc")
def test_later_steps_ask_the_system_for_no_pages(recipe, tmp_path):
    """A step of this size frees and makes anew tens of megabytes: thousands of pages, were they handed back."""
    made = recipe(
        shape={
            "d_model": 64, "head_dim": 16, "context": 256, "vocabulary": 257,
            "layers": [{"n_heads": 4, "n_kv_heads": 4, "d_ff": 512}],
        },
        data={"sequence": 256},
        batch={"tokens": 16384, "micro": 64},
        tokens=16384 * 8,
        evaluation={"every": None},
        checkpoint={"every": None},
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(made.model_dump(mode="json", by_alias=True)), str(tmp_path / "run")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    faults = json.loads(done.stdout.splitlines()[-1])
    asked = [after - before for before, after in itertools.pairwise(faults[2:])]
    # A heap may still grow once, by a block that found no hole; memory handed back would be asked for in every step.
    assert sum(pages > 1000 for pages in asked) <= 1, asked
