"""Progress on standard error: a bar with the time left on a terminal, elsewhere a line now and then.

    with progress.bars("bytes") as advance:
        work(advance)                       # calls advance(what, done, total) as often as it likes

Standard output stays with the answer, so `--json` is clean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[str, int, int | None], None]
"""(what is being done, how much of it is done, how much there is or None): a bar of its own for each `what`."""
_EVERY = 10.0
"""Seconds between two lines."""
_SOON = 3.0
"""What is done within so many seconds needs no line."""


@contextmanager
def bars(unit: str = "", *, console: Console | None = None) -> Iterator[Advance]:
    """Yields what the work calls. `unit` is what is counted (`tokens`); `bytes` shows sizes and speed."""
    from rich.console import Console

    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _lines(unit, console)
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    count = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *count,
        TextColumn(unit if unit != "bytes" else ""),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as shown:
        tasks: dict[str, TaskID] = {}

        def advance(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total or None)
            shown.update(tasks[what], completed=done, total=total or None)

        yield advance


def _lines(unit: str, console: Console) -> Advance:
    """A line for each `what` that takes more than a moment, then one every ten seconds."""
    begun: dict[str, float] = {}
    told: set[str] = set()
    said = 0.0

    def advance(what: str, done: int, total: int | None) -> None:
        nonlocal said
        now = time.monotonic()
        elapsed = now - begun.setdefault(what, now)
        if elapsed < _SOON or (what in told and now - said < _EVERY):
            return
        told.add(what)
        text = f"{what}: {_amount(done, unit)}" + (f" of {_amount(total, unit)}" if total else "")
        if total and done and elapsed > _EVERY / 2:
            text += f", {duration(elapsed * (total - done) / done)} left"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        said = now

    return advance


def _amount(n: int, unit: str) -> str:
    return f"{n / 1e6:,.1f} MB" if unit == "bytes" else f"{n:,} {unit}".rstrip()


def duration(seconds: float | None) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`; nothing for None."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 100 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole / 86400:,.0f} days"
