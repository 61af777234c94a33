"""For the fuzz tests: the driver, a folder in memory, and the count at the end."""

import sys
import tempfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "interop"))  # tiny_checkpoints


@pytest.fixture
def fuzz(request):
    from driver import Fuzz

    return Fuzz(request.node.user_properties)


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """A folder in memory where there is one, and the current one: opening a file on a disk costs more than all the rest."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path) as folder:
        monkeypatch.chdir(folder)
        yield Path(folder)


def pytest_terminal_summary(terminalreporter):
    """N inputs, how many findings, and the slowest."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    told = [(r, *value) for r in reports for name, value in r.user_properties if name == "fuzz"]
    if told:
        findings = sum(r.failed for r, *_ in told)
        inputs, slowest = sum(n for _, n, _ in told), max(seconds for *_, seconds in told)
        terminalreporter.write_line(
            f"fuzz: {inputs:,} inputs on {len(told)} surfaces, {findings} findings; the slowest took {slowest:.1f} s"
        )
