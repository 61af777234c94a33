"""A study that is stopped, killed or out of disk, as a process of its own: a word, whole checkpoints, nobody left behind."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.study.test_command import corpus, write  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("study")]

PATIENCE = 240.0


class Running:
    """`entasis study run` in a session of its own, once its first run is under way."""

    def __init__(self, folder: Path, file: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "entasis", "study", "run", str(file), "--output", str(folder)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        until(lambda: any(p.stat().st_size for p in folder.glob("runs/*/*/metrics.jsonl")))

    def workers(self) -> list[int]:
        """The processes that train."""
        tasks = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [p for p in map(int, tasks.read_text().split()) if "spawn_main" in _command(p)]

    def end(self) -> tuple[int, str]:
        """(Exit code, what was said on stderr), when it has ended."""
        _, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, errors


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def running(corpus: Path, tmp_path: Path) -> Iterator[Running]:  # noqa: F811
    # Far too long to end by itself, and no checkpoint but the one that is asked for.
    base = {"tokens": "2B", "checkpoint": {"every": None}}
    started = Running(tmp_path / "s", write(tmp_path, corpus, base=base, seeds=1))
    yield started
    if started.process.poll() is None:
        os.killpg(started.process.pid, signal.SIGKILL)
        started.process.communicate()


def checkpoints(folder: Path) -> list[Path]:
    return [p for p in folder.glob("runs/*/*/checkpoints/*") if not p.name.endswith(".partial")]


def test_sigterm_to_the_study_waits_for_the_checkpoint(running: Running) -> None:
    running.process.send_signal(signal.SIGTERM)
    code, errors = running.end()
    assert code == 1 and checkpoints(running.folder)
    assert errors.splitlines()[-1] == (
        f"entasis: stopped by SIGTERM with 0 of 2 runs done; `entasis study resume {running.folder}` goes on from there"
    )


def test_sigterm_to_every_process_of_the_study_saves_too(running: Running) -> None:
    os.killpg(running.process.pid, signal.SIGTERM)
    code, errors = running.end()
    assert code == 1 and checkpoints(running.folder)
    assert "stopped by SIGTERM" in errors and "Traceback" not in errors


def test_five_times_ctrl_c_is_once(running: Running) -> None:
    for _ in range(5):
        os.killpg(running.process.pid, signal.SIGINT)
        time.sleep(0.03)
    code, errors = running.end()
    assert code == 1 and checkpoints(running.folder)
    assert "stopped by Ctrl-C" in errors and "Traceback" not in errors


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_study_leaves_no_worker(running: Running) -> None:
    workers = running.workers()
    assert workers
    running.process.kill()
    running.end()
    until(lambda: not any(Path(f"/proc/{p}").exists() and "spawn_main" in _command(p) for p in workers))


@pytest.mark.skipif(sys.platform != "linux", reason="limits another process")
def test_a_disk_that_is_full_ends_the_study_with_a_word(running: Running) -> None:
    """The run cannot write its metrics, and the study cannot write that it failed."""
    for pid in (running.process.pid, *running.workers()):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, 1))
    code, errors = running.end()
    assert code == 1 and "Traceback" not in errors
    assert "on the disk of" in errors and f"`entasis study resume {running.folder}` goes on" in errors
