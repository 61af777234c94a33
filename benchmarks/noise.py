"""How small a difference can a CPU minute show? Size × tokens: noise of a paired difference, and what a run costs.

    python benchmarks/noise.py --output DIR [--sizes 440k,220k] [--tokens 120k,240k,360k] [--seeds 8] [--minutes 10] [key=value …]

For every cell the quickstart's baseline, its crown and its control are trained. Noise in bits per byte does not depend on
what else the machine does, and processor seconds hardly do. The last columns say how many seeds a number of processor
minutes pays for (baseline, one arm and the control, at a fixed number of seeds) and which difference they would show with
power 0.8. `key=value` changes the study of every cell (base.optimizer.name=muon); take another DIR for it. A second call with more --seeds adds what is missing; cells that are there are read.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np
from scipy import stats

from entasis import quantities
from entasis.data import prepare
from entasis.study import statistics, study_files

SIZES: dict[str, dict[str, Any]] = {
    "440k": {"budget": "440k", "layers": 8, "d_model": 64},
    "220k": {"budget": "220k", "layers": 6, "d_model": 48},
    "110k": {"budget": "110k", "layers": 6, "d_model": 32, "head_dim": 8},
}
ARMS = {"isotropic": {}, "crown": {"shape.profile": "crown"}, "half": {"control": True}}


def corpus(folder: Path) -> Path:
    """The quickstart's corpus, made once for all cells."""
    made = study_files.read("quickstart").corpora["stdlib"]
    if not (folder / "train").is_dir():
        prepare.prepare(
            made.sources,
            folder,
            train_tokenizer=made.train_tokenizer,
            validation=made.validation,
            limit=made.limit,
        )
    return folder.resolve()


def measure(output: Path, text: Path, size: str, tokens: str, seeds: int, others: list[str]) -> None:
    """Trains a cell as a study; processor seconds are added to `DIR/SIZE-TOKENS.json`."""
    folder = output / f"{size}-{tokens}"
    shape = [f"base.shape.{k}={v}" for k, v in SIZES[size].items()]
    changes = [
        *shape,
        f"arms={json.dumps(ARMS)}",
        f"base.tokens={tokens}",
        "corpora={}",
        f"base.data.train={text}/train",
        f"base.data.validation={text}/validation",
        "base.precision=fp32",
        "base.attention=sdpa",
        "base.compile=false",
        f"seeds={seeds}",
        *others,
    ]
    done = len(list(folder.glob("runs/*/*/result.json")))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "entasis", "study", "run", "quickstart", *changes]
    subprocess.run([*command, "--output", str(folder), "--json"], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    note = folder.with_suffix(".json")
    told = json.loads(note.read_text()) if note.is_file() else {"seconds": 0.0, "tokens": 0}
    new = [json.loads(p.read_text()) for p in sorted(folder.glob("runs/*/*/result.json"))]
    if len(new) > done:
        fresh = sum(r["tokens"] for r in new) - told["tokens"]
        note.write_text(json.dumps({"seconds": told["seconds"] + spent, "tokens": told["tokens"] + fresh}))


def row(output: Path, size: str, tokens: str, minutes: float) -> dict[str, Any]:
    """What a cell says."""
    folder = output / f"{size}-{tokens}"
    arms = json.loads((folder / "verdict.json").read_text())["protocols"]["params"]["arms"]
    told = json.loads(folder.with_suffix(".json").read_text())
    d = np.array(list(arms["crown"]["differences"].values()))
    control = np.array(list(arms["half"]["differences"].values()))
    n, sd = d.size, float(d.std(ddof=1))
    # Processor seconds for a token, validation and the start of processes with it.
    run = told["seconds"] / told["tokens"] * quantities.count(tokens, "tokens")
    affordable = int(minutes * 60 / (2.5 * run))
    return {
        "size": size,
        "tokens": tokens,
        "seeds": n,
        "sd": sd,
        "sd_95": [sd * math.sqrt((n - 1) / stats.chi2.ppf(q, n - 1)) for q in (0.975, 0.025)],
        "control": float(control.mean()),
        "control_sd": float(control.std(ddof=1)),
        "seconds_per_run": run,
        "affordable_seeds": affordable,
        "detectable": statistics.detectable_effect(sd, affordable) if affordable > 2 else None,
        "bits_per_byte": arms["isotropic"]["bits_per_byte"],
    }


def table(rows: list[dict[str, Any]], minutes: float) -> str:
    """In Markdown."""
    lines = [
        f"| parameters | tokens | bits per byte | sd of a paired difference (95 %) | control, sd | CPU s a run | seeds in "
        f"{minutes:g} CPU min | they would show |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        shown = f"{r['detectable']:.4f}" if r["detectable"] else "–"
        low, high = r["sd_95"]
        lines.append(
            f"| {r['size']} | {r['tokens']} | {r['bits_per_byte']:.3f} | {r['sd']:.4f} ({low:.4f} … {high:.4f}, {r['seeds']} "
            f"seeds) | {r['control']:+.4f}, {r['control_sd']:.4f} | {r['seconds_per_run']:.1f} | {r['affordable_seeds']} | "
            f"{shown} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures what is missing, writes results and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("changes", nargs="*", metavar="key=value")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sizes", default="440k,220k,110k")
    parser.add_argument("--tokens", default="120k,240k,360k")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=10.0, help="processor minutes that a study may take")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    text = corpus(args.output / "corpus")
    rows = []
    for size in args.sizes.split(","):
        for tokens in args.tokens.split(","):
            measure(args.output, text, size, tokens, args.seeds, args.changes)
            rows.append(row(args.output, size, tokens, args.minutes))
            print(table(rows[-1:], args.minutes).splitlines()[-1], flush=True)
    common.write("noise", ["torch", "numpy", "scipy"], minutes=args.minutes, changes=args.changes, rows=rows)
    print(table(rows, args.minutes))


if __name__ == "__main__":
    main()
