"""A full disk: one line with the path, the need and what to do; what was there before is intact.

On a small tmpfs where one may be mounted, else (and for files that are larger than allowed) under RLIMIT_FSIZE.
"""

import contextlib
import os
import resource
import shutil
import subprocess
import sys

import pytest

from .conftest import losses


@contextlib.contextmanager
def largest_file(size):
    """Files larger than `size` bytes cannot be written by this process: EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 600 kB: room for two checkpoints of the run and not for four."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no tmpfs may be mounted here; the tests under RLIMIT_FSIZE have run")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder, leave):
    """Takes all space but some `leave` bytes."""
    stuff = folder / "stuff"
    free = shutil.disk_usage(folder).free
    stuff.write_bytes(bytes(max(0, free - leave)))
    return stuff


def test_a_checkpoint_without_room_leaves_those_before_it(call, ground, small_disk):
    recipe, run = ground / "recipe.yaml", small_disk / "run"
    answer = call("train", recipe, "--output", run, "checkpoint.keep_last=9")
    answer.refused("no space left", str(run), "needed", "free", "goes on from step", code=1)
    assert not list((run / "checkpoints").glob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert call("train", recipe, "--output", run, "checkpoint.keep_last=9").code == 0
    assert losses(run) == losses(ground / "run")


@pytest.mark.parametrize("leave", [0, 4096, 40_000, 100_000])
def test_a_run_that_cannot_write_goes_on_when_it_can(call, ground, interrupted, small_disk, leave):
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    run = shutil.copytree(interrupted, small_disk / "run", ignore=shutil.ignore_patterns("step-00000004"))
    stuff = fill(small_disk, leave)
    answer = call("train", ground / "recipe.yaml", "--output", run)
    answer.refused("no space left", str(run), code=1)
    stuff.unlink()
    assert call("train", ground / "recipe.yaml", "--output", run).code == 0
    assert losses(run) == losses(ground / "run")


@pytest.mark.parametrize("size", [300, 1500, 6000, 30_000, 60_000])
def test_a_file_larger_than_allowed_is_told_like_a_full_disk(call, ground, tmp_path, size):
    run = tmp_path / "run"
    with largest_file(size):
        answer = call("train", ground / "recipe.yaml", "--output", run)
    answer.refused("larger than allowed", str(run), code=1)
    assert call("train", ground / "recipe.yaml", "--output", run).code == 0
    assert losses(run) == losses(ground / "run")


def test_weights_and_exports_without_room(call, ground, tmp_path):
    for to in ("hf", "gguf"):
        with largest_file(20_000):
            answer = call("export", ground / "run", "--to", to, "--output", tmp_path / to)
        answer.refused("on the disk of", str(tmp_path / to), "needed", code=1)
        assert not (tmp_path / to).exists()


def test_the_installed_command_says_one_line(ground, tmp_path):
    script = 'ulimit -f 20; exec "$0" -m entasis train "$1" --output "$2"'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, ground / "recipe.yaml", tmp_path / "run"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if "larger than allowed" in line]
