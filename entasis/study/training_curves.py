"""The training loss as training goes, over tokens, FLOPs and seconds, and its differences within a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from entasis.report import charts
from entasis.report.page import Page
from entasis.study.equal_cost import before_run
from entasis.study.plan import Plan
from entasis.study.results import Outcome
from entasis.train import recipe as recipes

_POINTS = 150
"""Points a curve keeps; each is the mean over its stretch of steps, so that no step is left out."""


def section(
    page: Page, baseline: str, plan: Plan, done: Sequence[Outcome], order: Sequence[str], folder: Path
) -> list[str]:
    """The charts as files and blocks of the page: every run's loss, and differences to the baseline's within a seed."""
    rows: list[dict[str, Any]] = []
    losses: dict[tuple[str, int], dict[int, float]] = {}
    read = {(o.label, o.run.seed): _reading(plan, o) for o in done}
    others = {label for (label, seed), own in read.items() if own != read.get((baseline, seed), own)}
    for o in done:
        metrics = o.metrics()
        rows += _curve(plan, o, metrics)
        losses[o.label, o.run.seed] = {m["tokens"]: m["loss"] for m in metrics}
    # The first steps fall from the logarithm of the vocabulary; what differs comes after.
    settled = [row["loss"] for row in rows if row["place"] > 0.1]
    kinds = {"tokens": "tokens", "FLOPs": "training FLOPs", "seconds": "seconds of training"}
    shown = {}
    for name, title in kinds.items():
        shown[name] = charts.lines(
            rows, x=name.lower(), x_title=title, y="loss", y_title="training loss, nats per token",
            series="arm", repeat="seed", order=order, top=float(np.max(settled)),
        )  # fmt: skip
        charts.save(shown[name], folder / "charts" / f"loss-{name.lower()}")
    blocks: list[str] = [
        page.switch(shown),
        page.note(
            "Every seed is drawn; each point is the mean over its stretch of steps. Click a name to bring its curves "
            "forward. Seconds are of this device, so their ranking holds for it alone."
        ),
    ]
    gaps = _gaps(baseline, {run: own for run, own in losses.items() if run[0] not in others})
    said = ""
    if gaps:
        chart = charts.lines(
            gaps, x="tokens", x_title="tokens", y="gap", y_title=f"training loss minus {baseline}'s, nats",
            series="arm", repeat="seed", order=order, zero=True, focus=0.1,
        )  # fmt: skip
        charts.save(chart, folder / "charts" / "loss-difference")
        blocks.append(page.chart(chart))
        said = (
            "The same curves as differences within a seed: as the data order is the same, its noise cancels. "
        )
    if others:
        said += (
            f"No differences to {baseline} step by step, as they read another text, in other batches or from another place: "
            f"{', '.join(label for label in order if label in others)}."
        )
    return [*blocks, page.note(said.strip())] if said else blocks


def _reading(plan: Plan, o: Outcome) -> tuple[str | None, list[Any]]:
    """What a run reads step by step: where it goes on from, and stretches of one text and batch with the tokens before them."""
    spans = plan.arms[o.run.arm].stages
    stretches: list[Any] = []
    tokens = 0
    for i, stage in enumerate(_stages(o)):
        # A plan may have turned into more stages than were foreseen, all of one text.
        span = spans[min(i, len(spans) - 1)]
        reads = (span.data.train, span.data.weights, span.data.sequence, span.batch_tokens)
        # One corpus is read on from stage to stage; the order in which several take turns begins anew.
        if not stretches or stretches[-1][0] != reads or len(recipes.mixture_of(span.data.train)) > 1:
            stretches.append((reads, tokens))
        tokens += stage["tokens"]
    written = o.run.recipe.get("start")
    start = recipes.Start.model_validate(written) if written else None
    kept = start is not None and (start.data_position or start.optimizer_state) == "keep"
    return start.folder if start and kept else None, stretches


def _stages(o: Outcome) -> list[dict[str, Any]]:
    """What a run's result says of its stages; a run of an earlier version, which names none, is one."""
    stages: list[dict[str, Any]] = o.result.get("stages", [o.result])
    return stages


def _curve(plan: Plan, o: Outcome, metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The run's training loss, averaged over stretches of steps; tokens, FLOPs and seconds at their ends."""
    loss = np.array([m["loss"] for m in metrics])
    seconds = np.cumsum([m["seconds"] for m in metrics])
    stretches = np.array_split(np.arange(len(metrics)), min(_POINTS, len(metrics)))
    before = before_run(plan.arms, plan.arms[o.run.arm])[1]  # of its trunks
    flops = _flops(o, metrics)
    return [
        {
            "arm": o.label,
            "seed": f"seed {o.run.seed}",
            "tokens": metrics[s[-1]]["tokens"],
            "flops": before + flops[s[-1]],
            "seconds": round(float(seconds[s[-1]]), 3),
            "loss": round(float(loss[s].mean()), 5),
            "place": round(float(s[-1] + 1) / len(metrics), 4),
        }
        for s in stretches
    ]


def _flops(o: Outcome, metrics: list[dict[str, Any]]) -> list[float]:
    """Training FLOPs of the run up to each step: each stage at its own price, and what its plan measured before the next."""
    stages = _stages(o)
    measured = o.result.get("importance", {"layers": [], "flops": 0.0})
    times = len(measured["layers"])
    begun_tokens, begun_flops = [0], [0.0]
    for i, stage in enumerate(stages):
        looked = measured["flops"] / times if i < times else 0.0
        begun_tokens.append(begun_tokens[-1] + stage["tokens"])
        begun_flops.append(begun_flops[-1] + stage["tokens"] * stage["flops_per_token"] + looked)
    return [
        begun_flops[i] + (m["tokens"] - begun_tokens[i]) * stages[i]["flops_per_token"]
        for m in metrics
        for i in [m.get("stage", 0)]
    ]


def _gaps(baseline: str, losses: dict[tuple[str, int], dict[int, float]]) -> list[dict[str, Any]]:
    """Differences to the baseline's loss within a seed, averaged over stretches of the steps that both have.

    `losses` are those after so many tokens, by run. They are subtracted before they are averaged: the stretches of runs
    of unequal length hold other steps.
    """
    rows = []
    for (label, seed), own in losses.items():
        base = losses.get((baseline, seed), {})
        common = [tokens for tokens in own if tokens in base]
        if label == baseline or not common:
            continue
        gaps = np.array([own[tokens] - base[tokens] for tokens in common])
        for s in np.array_split(np.arange(len(common)), min(_POINTS, len(common))):
            rows.append(
                {
                    "arm": label,
                    "seed": f"seed {seed}",
                    "tokens": common[s[-1]],
                    "place": round(float(s[-1] + 1) / len(common), 4),
                    "gap": round(float(gaps[s].mean()), 5),
                }
            )
    return rows
