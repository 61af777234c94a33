"""What all fuzz tests share: damages that hypothesis draws and makes small, the judge of a command, and the count.

A test names its seed (a sound input), how it is damaged, and what may come of it:

    def test_shapes(fuzz, seed):
        fuzz(changes(WORDS), 10_000, lambda edits: fuzz.command("shape", written(changed(seed, edits))))

`FUZZ=1` runs the whole number; without it a fiftieth runs. `FUZZ_SEED` gives other inputs.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import io
import os
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st

from entasis import cli

SECONDS, BYTES = 10, 2**30
"""What one input may take; the seconds are the processor's, so that a busy machine finds nothing that is not there."""
_PATIENCE = 300
"""Seconds by the clock after which an input is taken to wait for ever."""
SHARE = 1 if os.environ.get("FUZZ") else 50
SEED = int(os.environ.get("FUZZ_SEED", "0"))
_ROUND = 2_000
"""Inputs before hypothesis starts anew: it remembers all it has tried."""
_QUIET = hypothesis.settings(
    deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck), print_blob=False
)


class TooLong(BaseException):
    """No `except Exception` of the program takes it."""


class Fuzz:
    """Runs one test's inputs and counts them."""

    def __init__(self, told: list[tuple[str, Any]]) -> None:
        self.inputs, self.slowest, self.accepted = 0, 0.0, 0
        self.told = told
        """Where pytest looks for what a test has to tell."""

    def __call__(
        self, strategy: st.SearchStrategy, inputs: int, check: Callable, examples: Iterable[Any] = ()
    ) -> None:
        """`check` on each of `examples` (what was found once), and on a number of values of `strategy`.

        `check` returns whether the input was accepted; its exceptions are findings.
        """

        def late(*_: object) -> None:
            overdue.append(True)  # whatever becomes of the exception
            raise TooLong

        def guarded(value: Any) -> None:
            begun = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            faulthandler.dump_traceback_later(_PATIENCE, exit=True)  # where no handler gets a turn
            try:
                self.accepted += bool(check(value))
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                faulthandler.cancel_dump_traceback_later()
            assert not overdue or overdue.clear(), f"an input takes more than {SECONDS} seconds"
            self.slowest = max(self.slowest, time.process_time() - begun)
            self.inputs += 1

        overdue: list[bool] = []
        try:
            with _limits(late):
                for value in examples:
                    guarded(value)
                left = max(20, inputs // SHARE)
                for begin in range(0, left, _ROUND):
                    quiet = hypothesis.settings(_QUIET, max_examples=min(_ROUND, left - begin))
                    quiet(hypothesis.seed(SEED * 10**6 + begin)(hypothesis.given(strategy)(guarded)))()
        finally:
            self.told.append(("fuzz", (self.inputs, self.slowest)))

    def some_accepted(self) -> None:
        """The damages are not so coarse that all are found at the door."""
        assert self.accepted or SHARE > 1

    @staticmethod
    def command(*argv: str, codes: Sequence[int] = (0, 2), stdin: str = "") -> bool:
        """Whether the command line accepts this; otherwise it says why in one line, and nothing else happens."""
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # as strict as a real one
        said = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            try:
                code: Any = cli.main([str(a) for a in argv])
            except SystemExit as stop:  # --help
                code = stop.code or 0
        lines = [line for line in said.getvalue().split("\n") if line.startswith("entasis: ")]
        assert code in codes, (code, said.getvalue()[-2000:])
        assert "Traceback" not in said.getvalue()
        assert "out of memory" not in said.getvalue()
        if code == 2:
            assert len(lines) == 1 and said.getvalue().endswith(lines[0] + "\n"), said.getvalue()[-2000:]
            assert len(lines[0]) < 1500, len(lines[0])
        return code == 0


@contextlib.contextmanager
def _limits(late: Callable[..., None]):
    handler = signal.signal(signal.SIGPROF, late)
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, handler)


# Values

NASTY = [
    0, 1, -1, 2, 3, 7, 10**6, 2**31, 2**63, 10**40, 0.0, -0.5, 0.5, 1e-300, 1e308, float("nan"), float("inf"),
    True, False, None, "", "0", "1e400", "10%", "-3", "silu", "../../etc/passwd", "\ud800", "a\nb", "x" * 3000, "\x00",
    "\x1b[2J", [], [1], [None], {}, {"": 1}, {"factor": 0}, [[[]]], {"a": {"b": {"c": [1, 2, {}]}}},
]  # fmt: skip
_ACTIONS = "replace replace replace replace drop repeat wrap text move rename add".split()


def changes(words: Sequence[Any] = (), most: int = 3) -> st.SearchStrategy:
    """One to `most` changes of a value made of mappings and lists: see `changed`."""
    where = st.lists(st.integers(0, 40), min_size=1, max_size=7)
    return st.lists(
        st.tuples(where, st.sampled_from(_ACTIONS), st.sampled_from([*words, *NASTY])),
        min_size=1, max_size=most,
    )  # fmt: skip


def changed(value: Any, edits: Iterable[tuple[list[int], str, Any]]) -> Any:
    """The value with parts of it, at any depth, replaced, dropped, repeated, wrapped, moved, renamed or added to."""
    top = [copy.deepcopy(value)]
    for where, action, new in edits:
        place: Any = top
        key: Any = 0
        for step in where:
            if not isinstance(place[key], dict | list) or not place[key]:
                break
            place = place[key]
            key = list(place)[step % len(place)] if isinstance(place, dict) else step % len(place)
        if action == "drop":
            del place[key]
        elif action == "repeat" and isinstance(place, list):
            place[key:key] = [copy.deepcopy(place[key])] * (1 + where[0])
        elif action == "wrap":
            place[key] = [place[key]] if where[0] % 2 else {str(new)[:40]: place[key]}
        elif action == "text":
            place[key] = str(place[key])
        elif action == "move":
            place[key] = copy.deepcopy(top[0])
        elif action == "rename" and isinstance(place, dict):
            place[str(new)] = place.pop(key)
        elif action == "add" and isinstance(place, dict):
            place[str(new)[:40]] = 1
        else:
            place[key] = copy.deepcopy(new)
        if not top:
            break
    return top[0] if top else None


# Bytes

LENGTHS = [0, 1, 2, 9, 10, 32, 34, 123, 128, 255, 2**16, 2**31, 2**32, 2**40, 2**60, 2**63, 2**64 - 1]
_DAMAGES = "flip eight four byte cut delete repeat insert".split()


def damages(most: int = 4, within: int = 2**16) -> st.SearchStrategy:
    """One to `most` damages in the first `within` bytes: see `damaged`."""
    return st.lists(
        st.tuples(st.sampled_from(_DAMAGES), st.integers(0, within - 1), st.sampled_from(LENGTHS)),
        min_size=1, max_size=most,
    )  # fmt: skip


def damaged(content: bytes, edits: Iterable[tuple[str, int, int]]) -> bytes:
    """The bytes with some flipped, overwritten by a number, cut off, deleted, repeated or put in."""
    data = bytearray(content)
    for kind, at, value in edits:
        at %= len(data) + 1
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << value % 8
        elif kind == "eight":
            data[at : at + 8] = struct.pack("<Q", value)
        elif kind == "four":
            data[at : at + 4] = struct.pack("<I", value & 0xFFFFFFFF)
        elif kind == "cut" and value % 3 == 0:
            del data[at:]
        elif kind == "delete":
            del data[at : at + 1 + value % 40]
        elif kind == "repeat":
            data[at:at] = data[max(0, at - 1 - value % 60) : at]
        elif kind == "insert":
            data[at:at] = bytes([value % 256])
        elif at < len(data):
            data[at] = value % 256
    return bytes(data)
