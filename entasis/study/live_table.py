"""Shows a study while it runs: a live table of all runs, or plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from entasis import progress
from entasis.progress import duration
from entasis.study.executors.launchers import State, Watcher

_STYLE = {"waiting": "dim", "running": "cyan", "done": "green", "failed": "bold red"}
_EVERY = 20.0
"""Seconds between plain lines."""


@contextlib.contextmanager
def watching(console: Console, title: str) -> Iterator[Watcher]:
    """Yields a function that `execute` calls with the states of all runs."""
    clock = _Clock()
    if not console.is_terminal:
        yield _Lines(console, clock)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield lambda states: live.update(_table(title, states, clock, console.height))


@contextlib.contextmanager
def preparing(console: Console, title: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function that corpus preparation calls with its phase, the bytes done and the bytes in all."""
    with progress.bars("bytes", console=console) as advance:
        yield lambda phase, done, total: advance(f"{title}: {phase}", done, total)


class _Clock:
    """Time left, from the work done since this call began."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.before: float | None = None

    def left(self, states: Sequence[State]) -> float | None:
        """Seconds; None until something can be said."""
        total = sum(s.run.flops for s in states)
        done = sum(s.fraction * s.run.flops for s in states)
        if self.before is None:
            self.before = done
        share = done - self.before
        if share <= 0.01 * total:
            return None
        return (time.monotonic() - self.started) * (total - done) / share


class _Lines:
    """One line when a run ends or fails, and one for all every twenty seconds."""

    def __init__(self, console: Console, clock: _Clock) -> None:
        self.console, self.clock = console, clock
        self.told: set[str] | None = None
        self.last = time.monotonic()

    def __call__(self, states: Sequence[State]) -> None:
        if self.told is None:
            self.told = {s.run.folder for s in states if s.status == "done" and not s.steps}
            self._say(f"{len(states)} runs, {len(self.told)} of them done before")
        for s in states:
            if s.run.folder in self.told or s.status not in ("done", "failed"):
                continue
            self.told.add(s.run.folder)
            speed = f", {s.tokens_per_second:,.0f} tokens/s" if s.tokens_per_second else ""
            what = s.message if s.status == "failed" else f"loss {s.loss:.4f}{speed}"
            self._say(f"{s.status:7} {s.run.folder}: {what}")
        if time.monotonic() - self.last > _EVERY:
            self.last = time.monotonic()
            self._say(_summary(states, self.clock))

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _table(title: str, states: Sequence[State], clock: _Clock, height: int) -> Group:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading, justify in (
        ("arm", "left"), ("seed", "right"), ("state", "left"), ("", "left"), ("step", "right"),
        ("loss", "right"), ("tokens/s", "right"), ("ETA", "right"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    shown = _fitting(states, height - 6)
    for s in shown:
        running = s.status == "running"
        table.add_row(
            Text(s.run.folder.split("/", 1)[1].rsplit("/seed", 1)[0]),
            str(s.run.seed),
            Text(s.doing or s.status, style=_STYLE[s.status]),
            ProgressBar(total=1, completed=s.fraction, width=18),
            f"{s.step}/{s.steps}" if s.steps else "",
            f"{s.loss:.3f}" if s.loss is not None else "",
            f"{s.tokens_per_second:,.0f}" if s.tokens_per_second else "",
            Text(s.message[:60], style="red") if s.message else duration(s.eta_seconds) if running else "",
        )
    return Group(table, Text(_summary(states, clock), style="bold"))


def _fitting(states: Sequence[State], rows: int) -> list[State]:
    """As many runs as the screen holds: running and failed ones first, in their own order."""
    if len(states) <= rows:
        return list(states)
    rank = {"running": 0, "failed": 1, "waiting": 2, "done": 3}
    chosen = sorted(range(len(states)), key=lambda i: (rank[states[i].status], i))[: max(1, rows)]
    return [states[i] for i in sorted(chosen)]


def _summary(states: Sequence[State], clock: _Clock) -> str:
    count = {name: sum(s.status == name for s in states) for name in _STYLE}
    failed = f", {count['failed']} failed" if count["failed"] else ""
    left = clock.left(states)
    speed = sum(s.tokens_per_second or 0 for s in states if s.status == "running")
    eta = f", about {duration(left)} left" if left else ""
    return f"{count['done']} of {len(states)} runs done, {count['running']} running{failed}, {speed:,.0f} tokens/s{eta}"
