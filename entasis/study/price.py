"""What a study would cost and could show, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from entasis.report.tables import Column, Table
from entasis.study import conduct, execute, results, statistics
from entasis.study.definition import Study
from entasis.study.live import duration
from entasis.study.plan import Findings, lay_out, preparatory, solve

_UTILISATION = 1 / 3
"""Share of the measured matmul ceiling that small models reach in training; replaced by measured speed once
runs of this study are finished."""


def estimate(study: Study, folder: Path, *, noise: float | None = None) -> dict[str, Any]:
    """The grid with the cost of each run, totals, hours on this device, and the detectable effect.

    `noise` is the standard deviation of a paired difference in bits per byte; without one the study's own, or
    that of its finished runs, is taken.
    """
    vocabulary = conduct.vocabulary(study, folder) or next(
        (c.train_tokenizer for c in study.corpora.values() if c.train_tokenizer), None
    )
    arms = solve(study, vocabulary)
    prepared = preparatory(study, arms)
    # Until speeds are measured, equal time is taken as equal FLOPs.
    found = results.findings(study, folder, prepared)
    assumed = {name: 1e12 / arm.flops_per_token for name, arm in arms.items()}
    plan = lay_out(
        study,
        arms,
        Findings(multiplier=found.multiplier, tokens_per_second=found.tokens_per_second or assumed),
    )
    speed, source = _flops_per_second(study, folder, plan.runs)
    rows = [
        {
            "arm": name,
            "protocol": protocol,
            "parameters": arms[name].parameters,
            "flops_per_token": arms[name].flops_per_token,
            "tokens": runs[0].tokens,
            "runs": len(runs),
            "flops": runs[0].flops,
            "seconds": runs[0].flops / speed,
        }
        for protocol, by_arm in plan.grid.items()
        for name, runs in by_arm.items()
    ]
    total = sum(r.flops for r in plan.runs) + sum(r.flops for r in prepared)
    comparisons = len(set(plan.comparisons(study.baseline).values()))
    factor = statistics.detectable_effect(1.0, len(study.seeds), max(1, comparisons))
    sd, sd_source = _noise(study, folder, noise)
    return {
        "study": study.name,
        "rows": rows,
        "notes": [f"{name}: {note}" for name, arm in arms.items() for note in arm.notes],
        "preparatory_runs": len(prepared),
        "runs": len(plan.runs),
        "total_flops": total,
        "hours": total / speed / 3600,
        "flops_per_second": speed,
        "speed_source": source,
        "seeds": len(study.seeds),
        "comparisons": comparisons,
        "detectable_in_sd": None if factor != factor else factor,
        "noise": sd,
        "noise_source": sd_source,
        "detectable": sd * factor if sd is not None and factor == factor else None,
    }


def show(estimate: dict[str, Any], console: Console) -> None:
    """The estimate in the terminal."""
    table = Table(
        [
            Column("arm", "arm"),
            Column("protocol", "protocol"),
            Column("parameters", "parameters", ",d"),
            Column("flops_per_token", "FLOPs/token", ".3e", "training"),
            Column("tokens", "tokens", ",d"),
            Column("flops", "FLOPs", ".2e", "one run"),
            Column("time", "time", "s", "one run"),
            Column("runs", "runs", "d"),
        ],
        [{**row, "time": duration(row["seconds"])} for row in estimate["rows"]],
    )
    console.print(table.rich())
    extra = f" and {estimate['preparatory_runs']} preparatory" if estimate["preparatory_runs"] else ""
    lines = [
        *estimate["notes"],
        f"{estimate['runs']} runs{extra}, {estimate['total_flops']:.2e} training FLOPs, about "
        f"{duration(estimate['hours'] * 3600)} on this device ({estimate['speed_source']})",
        _showable(estimate),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _showable(estimate: dict[str, Any]) -> str:
    if estimate["detectable_in_sd"] is None:
        return "with one seed no interval can be given: take two seeds or more"
    start = (
        f"{estimate['seeds']} seeds and {estimate['comparisons']} comparisons (Holm) show, with probability 0.8, "
        f"a difference of {estimate['detectable_in_sd']:.2f} sd of a paired difference"
    )
    if estimate["detectable"] is None:
        return f"{start}; give --noise SD to have it in bits per byte"
    return f"{start}: {estimate['detectable']:.4f} bits per byte (sd {estimate['noise']:.4g}, {estimate['noise_source']})"


def _flops_per_second(study: Study, folder: Path, runs: list[Any]) -> tuple[float, str]:
    """FLOP/s of the whole device in training, and where the number comes from."""
    from entasis.train import hardware

    done = list(results.outcomes(folder, runs).values())
    device = hardware.device(str(study.base.get("device", "auto")))
    if done:
        at_once = len(execute.places(study.threads, len(runs)))
        speeds = [o.run.flops / o.result["seconds"] for o in done]
        return at_once * sum(speeds) / len(speeds), f"measured in {len(done)} finished runs"
    import torch

    count = torch.cuda.device_count() if device.type == "cuda" else 1
    ceiling = hardware.matmul_ceiling(device, "bf16" if hardware.bf16_product_is_faster(device) else "fp32")
    return count * ceiling * _UTILISATION, "a third of the measured matmul ceiling"


def _noise(study: Study, folder: Path, noise: float | None) -> tuple[float | None, str]:
    if noise is not None:
        return noise, "given"
    if study.noise is not None:
        return study.noise, "from the study file"
    path = folder / "verdict.json"
    if path.is_file():
        for part in results.json_of(path)["protocols"].values():
            if part["paired_sd"]:
                return float(part["paired_sd"]), "from the runs finished so far"
    return None, "unknown"
