"""Ctrl-C and SIGTERM: several within a second are one, and what they end says so in a line.

They come in bunches: from an impatient hand, from a batch system that tells a group and each of its processes, from
`torchrun`, which passes on what the terminal has told its workers already.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_TOGETHER = 1.0
"""Seconds within which signals are one."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


_came: str | None = None


def hear() -> str | None:
    """The signal that has come inside `raised`, in words; if it still waits for an import to end, it will not be raised.

    An exception out of a handler may be lost (in a library's callback, say) or end in another one.
    """
    if _came:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return _came


def name_of(error: KeyboardInterrupt) -> str:
    """Which signal raised it."""
    return "SIGTERM" if isinstance(error, Terminated) else "Ctrl-C"


@contextlib.contextmanager
def raised(*, last: bool) -> Iterator[None]:
    """Inside, SIGINT raises `KeyboardInterrupt` and SIGTERM `Terminated`; the first one waits for an import to end.

    An exception that comes while torch builds its classes from C++ ends the process with C++'s words. A second signal, more
    than a second later, waits for nothing.

    `last` says that the process ends with the block: once a signal has come, no other disturbs its end.
    """
    global _came
    told: float | None = None
    _came = None

    def act(number: int, frame: FrameType | None) -> None:
        nonlocal told
        global _came
        now = time.monotonic()
        first = told is None
        if told is not None and now - told < _TOGETHER:
            return
        told = now
        _came = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
        error = KeyboardInterrupt if number == signal.SIGINT else Terminated

        def look_again(_number: int, frame: FrameType | None) -> None:
            if not _is_importing(frame):
                signal.setitimer(signal.ITIMER_REAL, 0)
                raise error

        if not (first and _is_importing(frame)):
            raise error
        signal.signal(signal.SIGALRM, look_again)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)

    def ignore(lost: Any) -> None:
        # An exception that a library's callback swallows is told by `hear`, not by Python's traceback of it.
        if not isinstance(lost.exc_value, KeyboardInterrupt):
            hook(lost)

    hook, sys.unraisablehook = sys.unraisablehook, ignore
    with _handled(act) as before:
        try:
            yield
        finally:
            sys.unraisablehook = hook
            hear()
            if last and told is not None and before:
                before.update(dict.fromkeys(_SIGNALS, signal.SIG_IGN))


class Request(threading.Event):
    """Set by the first signal, which it names."""

    by = "Ctrl-C"


@contextlib.contextmanager
def requested() -> Iterator[Request]:
    """Yields an event that the first signal sets, at once where one has come already; a signal more than a second later has
    its effect of before the block."""
    asked = Request()
    first = 0.0

    def ask(number: int, frame: object) -> None:
        nonlocal first
        if not asked.is_set():
            first = time.monotonic()
            asked.by = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
            asked.set()
        elif time.monotonic() - first >= _TOGETHER:
            _act_as(before[number], number, frame)

    with _handled(ask) as before:
        if signal_before := hear():
            asked.by = signal_before
            asked.set()
        yield asked


@contextlib.contextmanager
def _handled(handler: Callable[[int, Any], None]) -> Iterator[dict[int, Any]]:
    """Sets a handler for both signals; gives the earlier ones, and puts them back. Idle outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    before: dict[int, Any] = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield before
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether an import is under way in this frame or one that called it."""
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def _act_as(earlier: Any, number: int, frame: object) -> None:
    if callable(earlier):
        earlier(number, frame)
    elif earlier == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
