"""A training run keeps the memory it has freed instead of asking the system for it again."""

import itertools
import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys
from pathlib import Path
from entasis.train import run
from entasis.train.recipe import from_dict

if sys.argv[3] == "as the C library does":
    run.keep_freed_memory = lambda: False
faults = []
run.train(from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), reporter=lambda event: faults.append(
    resource.getrusage(resource.RUSAGE_SELF).ru_minflt) if event["event"] == "step" else None)
print(json.dumps(faults))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library is not glibc")
def test_later_steps_ask_the_system_for_few_pages(recipe, tmp_path):
    """A step of this size frees and makes anew tens of megabytes: thousands of pages each time, where they are handed back."""
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
    given = json.dumps(made.model_dump(mode="json", by_alias=True))

    def asked(way: str) -> list[int]:
        """Pages that each step but the first two asked for."""
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, given, str(tmp_path / way), way],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return [b - a for a, b in itertools.pairwise(json.loads(done.stdout.splitlines()[-1])[1:])]

    kept, handed_back = asked("kept"), asked("as the C library does")
    # A heap that is kept may still grow by a few blocks that find no hole.
    assert sum(kept) < sum(handed_back) / 4, (kept, handed_back)
