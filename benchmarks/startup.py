"""Seconds until the command line answers.

    python benchmarks/startup.py

Each command several times in fresh processes; the first is dropped, as it reads the files from disk.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from common import write

COMMANDS = {
    "help": ["--help"],
    "shape": ["shape", "crown-paper/crown-18"],
    "shape --json": ["shape", "crown-paper/crown-18", "--json"],
    "train --help": ["train", "--help"],
}
ROUNDS = 10


def main() -> None:
    """Writes and prints benchmarks/results/startup-TIME.json."""
    seconds: dict[str, list[float]] = {name: [] for name in ("python", *COMMANDS)}
    for _ in range(ROUNDS + 1):
        seconds["python"].append(timed(["-c", "pass"]))
        for name, words in COMMANDS.items():
            seconds[name].append(timed(["-m", "entasis", *words]))
    write(
        "startup",
        ["entasis"],
        seconds={name: statistics.median(values[1:]) for name, values in seconds.items()},
        slowest={name: max(values[1:]) for name, values in seconds.items()},
    )


def timed(words: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
