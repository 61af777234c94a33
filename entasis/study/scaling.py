"""Does an arm's advantage last? Several studies of the same arms at growing budgets, fitted together.

    L_a(C) = E + A_a · C^-α        L in bits per byte, C in training FLOPs, E and α shared by all arms

Then L_a(C) = L_base(m·C) with the compute multiplier m = (A_base / A_a)^(1/α): an arm with m = 1.1 is as good as
the baseline is with a tenth more compute. Huber loss (δ = 1e-3) on the logarithm of the score, as in Hoffmann et
al. (2203.15556). The interval leaves out one seed at a time and fits everything anew (jackknife, Student's t).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entasis.errors import UserError
from entasis.report.tables import Column, Table
from entasis.study import results, verdict
from entasis.study.statistics import CONFIDENCE

LEAST = 3
"""Budgets that two shared numbers and one of each arm need at the least."""
_DELTA = 1e-3

Scores = Mapping[str, NDArray[np.float64]]
"""Per arm [budgets, seeds]: bits per byte; the FLOPs beside them have the same shape."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What all arms share, and each arm's own."""

    floor: float
    """E, bits per byte."""
    exponent: float
    """α."""
    log_scale: dict[str, float]
    """log A of each arm."""
    error: float
    """Root mean square of the residuals of log L."""

    def multiplier(self, arm: str, baseline: str) -> float:
        """The compute multiplier m of an arm."""
        return math.exp((self.log_scale[baseline] - self.log_scale[arm]) / self.exponent)


def fit(flops: Scores, scores: Scores, near: Fit | None = None) -> Fit:
    """The shared curve of all arms: the best of several beginnings, or the one found from a fit `near` it."""
    from scipy.optimize import least_squares

    arms = list(scores)
    which = np.concatenate([np.full(scores[a].size, i) for i, a in enumerate(arms)])
    observed = np.log(np.concatenate([np.ravel(scores[a]) for a in arms]))
    compute = np.log(np.concatenate([np.ravel(flops[a]) for a in arms]))
    # Compute is counted from the middle of the budgets: log A and α then hardly depend on each other.
    middle = float(compute.mean())
    lowest = float(np.exp(observed.min()))

    def residuals(p: NDArray[np.float64]) -> NDArray[np.float64]:
        # Steps that try absurd exponents must not overflow.
        power = np.clip(p[2 + which] - np.exp(p[1]) * (compute - middle), -50, 50)
        return np.log(np.exp(p[0]) + np.exp(power)) - observed

    if near:
        starts = [(near.floor, near.exponent)]
    else:
        starts = [(share * lowest, exponent) for share in (0.3, 0.8) for exponent in (0.05, 0.3)]
    best = None
    for floor, exponent in starts:
        start = np.full(2 + len(arms), math.log(max(lowest - floor, 0.05 * lowest)))
        start[:2] = math.log(floor), math.log(exponent)
        found = least_squares(
            residuals, start, loss="huber", f_scale=_DELTA, x_scale="jac",
            ftol=1e-12, xtol=1e-12, gtol=1e-12, max_nfev=500,
        )  # fmt: skip
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    exponent = float(np.exp(best.x[1]))
    return Fit(
        floor=float(np.exp(best.x[0])),
        exponent=exponent,
        log_scale={a: float(best.x[2 + i]) + exponent * middle for i, a in enumerate(arms)},
        error=float(np.sqrt((residuals(best.x) ** 2).mean())),
    )


def multipliers(
    flops: Scores, scores: Scores, baseline: str, confidence: float = CONFIDENCE
) -> tuple[Fit, dict[str, tuple[float, float, float]]]:
    """The fit, and per arm (m, low, high). One seed gives NaN bounds."""
    from scipy import stats

    whole = fit(flops, scores)
    seeds = next(iter(scores.values())).shape[1]
    others = [arm for arm in scores if arm != baseline]
    m = {arm: math.log(whole.multiplier(arm, baseline)) for arm in others}
    if seeds < 2:
        return whole, {arm: (math.exp(m[arm]), math.nan, math.nan) for arm in others}
    without: dict[str, list[float]] = {arm: [] for arm in others}
    for s in range(seeds):
        costs, left_over = ({a: np.delete(x, s, axis=1) for a, x in part.items()} for part in (flops, scores))
        left = fit(costs, left_over, near=whole)
        for arm in others:
            without[arm].append(math.log(left.multiplier(arm, baseline)))
    quantile = float(stats.t.ppf((1 + confidence) / 2, seeds - 1))
    answer = {}
    for arm in others:
        pseudo = seeds * m[arm] - (seeds - 1) * np.array(without[arm])
        half = quantile * float(pseudo.std(ddof=1)) / math.sqrt(seeds)
        answer[arm] = (math.exp(m[arm]), math.exp(m[arm] - half), math.exp(m[arm] + half))
    return whole, answer


def scale(folders: Sequence[Path]) -> tuple[dict[str, Any], Table, list[str]]:
    """The answer (plain values), its table, and sentences about it, of at least three finished studies.

    Raises `UserError` for fewer, for other baselines, tokenizers or texts, and where a pair is missing.
    """
    if len(folders) < LEAST:
        raise UserError(
            f"a scaling fit needs at least {LEAST} studies of different budgets, not {len(folders)}"
        )
    baseline, protocol, flops, scores, seeds, left_out = _budgets(folders)
    arms = list(scores)
    found, answer = multipliers(flops, scores, baseline)
    rows = [
        {
            "arm": arm,
            "multiplier": answer[arm][0] if arm in answer else 1.0,
            "low": answer[arm][1] if arm in answer else None,
            "high": answer[arm][2] if arm in answer else None,
            **{f"budget_{i}": float(scores[arm][i].mean()) for i in range(len(folders))},
        }
        for arm in arms
    ]
    table = Table(
        [
            Column("arm", "arm"),
            Column("multiplier", "compute multiplier", ".3f", f"m in L(C) = L_{baseline}(m·C)"),
            Column("low", "95 % from", ".3f", "over seeds"),
            Column("high", "to", ".3f"),
            *(
                Column(f"budget_{i}", "bits per byte", ".4f", f"{flops[baseline][i, 0]:.2e} FLOPs")
                for i in range(len(folders))
            ),
        ],
        rows,
    )
    notes = [
        f"L = {found.floor:.4f} + A·C^-{found.exponent:.4f} under {protocol} for {len(arms)} arms, {len(folders)} "
        f"budgets, {len(seeds)} seeds; residuals of log L: {found.error:.2%} (root mean square).",
        *(_says(arm, *answer[arm], baseline) for arm in answer),
        "Compute is training FLOPs along the path of budgets that was chosen; nothing is said beyond it.",
        *left_out,
    ]
    plain = {
        "baseline": baseline,
        "protocol": protocol,
        "seeds": seeds,
        "left_out": left_out,
        "floor": found.floor,
        "exponent": found.exponent,
        "rms_log_error": found.error,
        "arms": [{k: None if v != v else v for k, v in row.items()} for row in rows],
    }
    return plain, table, notes


def _budgets(
    folders: Sequence[Path],
) -> tuple[str, str, dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]], list[int], list[str]]:
    """Baseline, protocol, training FLOPs and scores of each arm ([budgets, seeds] each), the seeds, and what is left out.

    Raises `UserError`.
    """
    verdicts = [verdict.read(folder) for folder in folders]
    baselines = {v.baseline for v in verdicts}
    if len(baselines) > 1:
        raise UserError(f"the studies have different baselines: {', '.join(sorted(baselines))}")
    baseline = baselines.pop()
    protocol = next(iter(verdicts[0].protocols))
    parts = [v.protocols[protocol] for v in verdicts if protocol in v.protocols]
    if len(parts) < len(verdicts):
        raise UserError(f"protocol {protocol} is not in every study")
    _same_text(folders, baseline)
    arms = [a for a in parts[0].arms if all(a in p.arms for p in parts)]
    seeds = sorted(set.intersection(*({*p.arms[a].scores} for p in parts for a in arms)))
    if len(arms) < 2 or not seeds:
        raise UserError("the studies share no two arms with a finished seed in every budget")
    scores = {a: np.array([[p.arms[a].scores[s] for s in seeds] for p in parts]) for a in arms}
    flops = {a: np.array([[_spent(p.arms[a])] * len(seeds) for p in parts]) for a in arms}
    if len({float(x) for x in flops[baseline][:, 0]}) < LEAST:
        raise UserError(f"the baseline's training FLOPs take fewer than {LEAST} different values")
    return baseline, protocol, flops, scores, seeds, list(_left_out(folders, verdicts, protocol, arms, seeds))


def _left_out(
    folders: Sequence[Path],
    verdicts: Sequence[verdict.Verdict],
    protocol: str,
    arms: Sequence[str],
    seeds: Sequence[int],
) -> Iterator[str]:
    """What the studies have and the fit has not: protocols, arms, seeds, and runs that failed or are missing."""
    others = dict.fromkeys(p for v in verdicts for p in v.protocols if p != protocol)
    if others:
        yield f"Not fitted: {', '.join(others)}; the fit is of {protocol}, the first protocol of {folders[0]}."
    parts = dict(zip(folders, (v.protocols[protocol] for v in verdicts), strict=True))
    for arm in dict.fromkeys(arm for part in parts.values() for arm in part.arms if arm not in arms):
        without = [str(folder) for folder, part in parts.items() if arm not in part.arms]
        yield f"Left out: arm {arm}, which is not in {', '.join(without)}."
    for seed in sorted({s for part in parts.values() for a in arms for s in part.arms[a].scores} - {*seeds}):
        without = [
            f"{arm} in {folder}"
            for folder, part in parts.items()
            for arm in arms
            if seed not in part.arms[arm].scores
        ]
        yield f"Left out: seed {seed}, not finished by {', '.join(without)}."
    for folder, v in zip(folders, verdicts, strict=True):
        if v.failed or not v.complete:
            yield f"{folder}: {v.finished} of {v.runs} runs are finished, {len(v.failed)} failed."


def _spent(arm: verdict.ArmVerdict) -> float:
    """Training FLOPs, those of the trunk with them; NaN where none are known."""
    return float(arm.training_flops or math.nan) + (arm.trunk.flops if arm.trunk else 0)


def _says(arm: str, m: float, low: float, high: float, baseline: str) -> str:
    if math.isnan(low):
        return f"{arm}: m = {m:.3f}; one seed gives no interval."
    if low > 1 or high < 1:
        more = "less" if m > 1 else "more"
        return f"{arm} needs {more} compute than {baseline} for the same score: m = {m:.3f} ({low:.3f} … {high:.3f})."
    return f"{arm}: no difference in compute detected, m = {m:.3f} ({low:.3f} … {high:.3f})."


def _same_text(folders: Sequence[Path], baseline: str) -> None:
    """Fits mix scores, so tokenizer and held-out documents must be the same. Raises `UserError`."""
    seen = {}
    for folder in folders:
        paths = sorted(
            p for arm in (baseline, f"{baseline}@*") for p in (folder / "runs").glob(f"{arm}/*/result.json")
        )
        if not paths:
            raise UserError(f"{folder}: holds no finished run of {baseline}")
        result = results.json_of(paths[0])
        scored = [result["validation"][key] for key in ("documents", "bytes")]
        seen[folder] = (result["data"]["tokenizer"], result["data"].get("validation"), *scored)
    first = folders[0]
    for folder, text in seen.items():
        if text != seen[first]:
            raise UserError(
                f"{first} and {folder} differ in tokenizer or held-out documents; they cannot be fitted as one"
            )
