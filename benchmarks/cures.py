"""Which cures make a study less noisy for the same money? The sd of a paired difference before and after.

    python benchmarks/cures.py --output DIR [--seeds 20] [--tokens 300k] [--study quickstart] [--cures ema,nested]

The baseline and the crown of a study (two learning rates, for the trunk: arms of one shape) are trained on fresh seeds, as
they are and with each cure, on the same seeds. Pitman and Morgan's test compares the two variances, paired by seed; Holm over the
cures. One is kept only where the sd falls. Scores do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import noise
import numpy as np
from scipy import stats

from entasis import quantities
from entasis.study import statistics

FIRST_SEED = 100
"""No study has been looked at with seeds from here on."""
SHAPES = {"isotropic": {}, "crown": {"shape.profile": "crown"}}
RATES = {"isotropic": {}, "faster": {"optimizer.lr": 4.5e-3}}
CURES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ema": (SHAPES, ["base.average={ema: 0.98}"]),
    "last": (SHAPES, ["base.average={last: 10, every: 1%}"]),
    "nested": (SHAPES, ["base.init=nested"]),
    "text": (SHAPES, ["base.evaluation.tokens=null"]),
    "trunk": (RATES, []),
}


def differences(folder: Path, text: Path, arms: dict[str, Any], changes: list[str], args: Any) -> np.ndarray:
    """The second arm minus the first, seed by seed; trains what is missing."""
    seeds = list(range(FIRST_SEED, FIRST_SEED + args.seeds))
    command = [sys.executable, "-m", "entasis", "study", "run", args.study, *changes]
    command += [
        f"arms={json.dumps(arms)}",
        "baseline=isotropic",
        "corpora={}",
        f"base.data.train={text}/train",
        f"base.data.validation={text}/validation",
        "base.precision=fp32",
        "base.attention=sdpa",
        "base.compile=false",
        f"seeds={seeds}",
        "--output",
        str(folder),
        "--json",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    verdict = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
    other = next(name for name in arms if name != "isotropic")
    found = verdict["protocols"]["params"]["arms"][other]["differences"]
    return np.array([found[str(s)] for s in seeds])


def pitman_morgan(before: np.ndarray, after: np.ndarray) -> float:
    """One-sided p that the variance after is not below the one before, paired: r of sums and differences."""
    r = float(np.corrcoef(before + after, before - after)[0, 1])
    n = before.size
    return float(stats.t.sf(r * math.sqrt((n - 2) / (1 - r**2)), n - 2))


def trunk(arms: dict[str, Any], tokens: int) -> tuple[dict[str, Any], list[str]]:
    """The same arms from a common trunk for each seed, half of the tokens being the trunk's."""
    own = {
        name: {**changes, "start": {"from": {"trunk": "half"}}, "tokens": tokens - tokens // 2}
        for name, changes in arms.items()
    }
    return own, [f"trunks={json.dumps({'half': {'tokens': tokens // 2}})}"]


def main() -> None:
    """Measures, writes results and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--study", default="quickstart")
    parser.add_argument("--tokens", default="120k")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--cures", default=",".join(CURES))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    text = noise.corpus(args.output / "corpus")
    length = [f"base.tokens={args.tokens}"]
    rows = []
    for cure in args.cures.split(","):
        arms, changes = CURES[cure]
        plain = args.output / ("shapes" if arms is SHAPES else "rates")
        before = differences(plain, text, arms, length, args)
        cured = arms
        if cure == "trunk":
            cured, changes = trunk(arms, quantities.count(args.tokens, "--tokens"))
        after = differences(args.output / cure, text, cured, [*length, *changes], args)
        rows.append(
            {
                "cure": cure,
                "before": float(before.std(ddof=1)),
                "after": float(after.std(ddof=1)),
                "mean_before": float(before.mean()),
                "mean_after": float(after.mean()),
                "p": pitman_morgan(before, after),
            }
        )
    for row, p in zip(rows, statistics.holm([r["p"] for r in rows]), strict=True):
        row["p_holm"] = p
    common.write("cures", ["torch", "numpy", "scipy"], seeds=args.seeds, tokens=args.tokens, rows=rows)
    print("| cure | sd before | sd after | ratio | p (Pitman–Morgan, Holm) | difference before, after |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['cure']} | {r['before']:.4f} | {r['after']:.4f} | {r['after'] / r['before']:.2f} | {r['p_holm']:.3g} | "
            f"{r['mean_before']:+.4f}, {r['mean_after']:+.4f} |"
        )


if __name__ == "__main__":
    main()
