"""Shows a run while it trains: a bar on a terminal, lines elsewhere, or with `live` one table at a glance.

All of it is on standard error, so that `--json` stays clean.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from entasis.progress import duration
from entasis.train.candidates import told

_MARKS = "▁▂▃▄▅▆▇█"
_LAST = 10
"""Steps that a shown loss is the mean of."""


class Display:
    """Shows the events of a run (`entasis.train.run.train`); a context manager, so that it ends whatever happens."""

    def __init__(self, folder: Path, *, live: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._table = _Table(folder, self._console.width) if live else None
        self._shown: Live | None = None
        self._bar = ProgressBar(width=30)
        self._figures = ""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._shown.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Takes one event."""
        kind = event["event"]
        if self._table:
            self._table.take(event)
        if kind == "note":
            self._say(f"note: {event['text']}")
        elif kind == "start":
            self._start(event)
        elif kind == "importance":
            order = sorted(range(len(event["layers"])), key=lambda i: -event["layers"][i])
            self._say(f"layers by importance: {', '.join(map(str, order))}")
        elif kind == "stage":
            self._say(_told_of_stage(event))
        elif kind == "merged":
            self._say(f"adapters merged; logits moved by {event['moved']:.1e} of the largest")
        elif kind == "step":
            figures = f"loss {event['loss']:.4f}  {event['tokens_per_second']:,.0f} tokens/s"
            self._bar.update(completed=event["step"], total=event["steps"])
            self._figures = (
                f" {event['step']}/{event['steps']}  {figures}  {duration(event['eta_seconds'])} left"
            )
            if not self._shown and event["step"] % max(1, event["steps"] // 10) == 0:
                self._say(f"step {event['step']}/{event['steps']}  {figures}")
        elif kind == "samples" and not (self._table and self._shown):
            for text in event["texts"]:
                self._say(f"step {event['step']}: {text!r}")
        elif kind == "validation" and not (self._table and self._shown):
            each = "".join(f", {name} {score:.4f}" for name, score in event["by_corpus"].items())
            self._say(f"step {event['step']}: validation {event['bits_per_byte']:.4f} bits per byte{each}")

    def _picture(self) -> Any:
        return self._table.picture() if self._table else Group(self._bar, Text(self._figures, no_wrap=True))

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _start(self, event: dict[str, Any]) -> None:
        compiled = "compiled" if event["compile"] else "eager"
        self._say(
            f"{event['parameters']:,} parameters, {event['distinct_layers']} distinct layer shapes, "
            f"{event['device']} in {event['precision']}, {compiled}, {event['attention']} attention"
            + (f"; going on from step {event['step']}" if event["step"] else "")
        )
        self._say(f"data: {_told_of_data(event['data'])}")
        if event["auto"] and not event["step"]:
            self._say(_chosen(event["auto"]))
        if event["checkpointed_layers"]:
            layers = ", ".join(map(str, event["checkpointed_layers"]))
            self._say(f"activation checkpointing: layers {layers}")
        for note in event["notes"]:
            self._say(f"note: {note}")
        if self._console.is_terminal:
            self._shown = Live(
                console=self._console,
                refresh_per_second=4,
                transient=not self._table,
                get_renderable=self._picture,
            )
            self._shown.start()


class _Table:
    """The state of one run in seven lines, none of them wider than 80 columns."""

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width = folder, min(80, width)
        self.losses: list[float] = []
        self.scores: list[tuple[float, int]] = []
        self.last: dict[str, Any] = {}
        self.begun = time.monotonic()

    def take(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            self.losses.append(event["loss"])
            self.last = event
        elif event["event"] == "validation":
            self.scores.append((event["bits_per_byte"], event["step"]))

    def picture(self) -> Text:
        if not self.last:
            return Text("the first step is under way", style="dim")
        e = self.last
        recent = self.losses[-_LAST:]
        left = f"{duration(time.monotonic() - self.begun)} so far, {duration(e['eta_seconds'])} left"
        rows = [
            ("step", f"{e['step']:,} of {e['steps']:,}", left),
            ("loss", f"{sum(recent) / len(recent):.4f}", sparkline(self.losses, self.width - 34)),
            ("validation", *self._validation()),
            ("rate", f"{e['lr']:.3g}", f"gradient norm {e['gradient_norm']:.3g}"),
            ("tokens", f"{e['tokens']:,}", f"{e['tokens_per_second']:,.0f} a second"),
            ("MFU", f"{e['mfu']:.1%}", f"waiting for data {e['data_wait']:.1%}"),
            ("memory", f"{e['memory_bytes'] / 1e6:,.0f} MB", "at most"),
        ]
        text = Text(f"{self.folder}"[-self.width :], style="bold", no_wrap=True, overflow="crop")
        for name, figure, more in rows:
            text.append(f"\n{name:<11}", style="dim")
            text.append(f"{figure:>20}  ", style="none")
            text.append(f"{more}"[: self.width - 33], style="none" if name == "loss" else "dim")
        return text

    def _validation(self) -> tuple[str, str]:
        if not self.scores:
            return "–", "not yet"
        score, step = self.scores[-1]
        best, at = min(self.scores)
        return f"{score:.4f} bits/byte", f"at step {step:,}; best {best:.4f} at {at:,}"


def sparkline(values: list[float], width: int) -> str:
    """The values as blocks of eight heights in at most `width` characters, each the mean of its stretch."""
    count = min(width, len(values))
    means = []
    for i in range(count):
        part = values[i * len(values) // count : (i + 1) * len(values) // count]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    return "".join(_MARKS[round(7 * (x - low) / ((high - low) or 1))] for x in means)


def _chosen(auto: dict[str, Any]) -> str:
    """How what was left to `auto` was settled."""
    what = ", ".join(auto["settled"])
    if not auto["timings"]:
        return f"auto ({what}): the run is too short to time candidates; the simplest are taken"
    return (
        f"auto ({what}): one step takes {told(auto['timings'])}; timed in {auto['seconds']:.1f} s, within "
        f"{auto['margin']:.0%} the simpler is taken"
    )


def _told_of_data(data: list[dict[str, Any]]) -> str:
    """The corpora of the stage to come, their shares, and how often they are read in all."""
    if len(data) == 1:
        return f"{data[0]['path']}, {data[0]['epochs']:.2f} epochs"
    return ", ".join(f"{d['name']} {100 * d['share']:.3g} % ({d['epochs']:.2f} epochs)" for d in data)


def _told_of_stage(stage: dict[str, Any]) -> str:
    most = stage["most_active_parameters"]
    within = f" (at most {most:,})" if most is not None else ""
    return (
        f"stage {stage['stage'] + 1} of {stage['stages']}: {stage['active_parameters']:,} active parameters{within}, "
        f"{stage['frozen_parameters']:,} frozen"
    )
