"""Two commands in one folder at the same moment."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from .conftest import losses


def command(ground, folder, *more):
    return [sys.executable, "-m", "entasis", "train", ground / "recipe.yaml", "--output", folder, *more]


@pytest.mark.slow
def test_the_second_is_refused_and_the_first_ends_as_if_alone(call, ground, tmp_path):
    folder = tmp_path / "run"
    long = ["tokens=20k", "checkpoint.every=50"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen(
        [*command(ground, folder), *long], env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (folder / "metrics.jsonl").is_file()
        os.kill(first.pid, signal.SIGSTOP)
        call("train", ground / "recipe.yaml", "--output", folder, *long).refused("another `entasis train`")
        os.kill(first.pid, signal.SIGCONT)
        assert first.wait(timeout=300) == 0
    finally:
        first.kill()
    assert call("train", ground / "recipe.yaml", "--output", tmp_path / "alone", *long).code == 0
    assert losses(folder) == losses(tmp_path / "alone")
    told, alone = (json.loads((f / "result.json").read_text()) for f in (folder, tmp_path / "alone"))
    assert (told["loss"], told["validation"]) == (alone["loss"], alone["validation"])


def test_a_lock_dies_with_its_process(call, ground, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    held = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire();"
            "print('held', flush=True); time.sleep(600)",
            folder / ".lock",
        ],
        stdout=subprocess.PIPE,
    )
    assert held.stdout.readline() == b"held\n"
    call("train", ground / "recipe.yaml", "--output", folder).refused("another `entasis train`")
    held.kill()
    held.wait()
    assert call("train", ground / "recipe.yaml", "--output", folder).code == 0
