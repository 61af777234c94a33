"""What does it cost, and save, to stop a study when one knows? Levels and seeds by simulated studies.

    python benchmarks/stopping.py [--studies 2000] [--docs]

Every study is run through `entasis.study.stopping`, round by round, as a real one is. Arms share the baseline's noise,
protocols share half of an arm's. `--docs` puts the tables into docs/studies.md. Needs no quiet machine: nothing is timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from pathlib import Path
from typing import Any

import common
import numpy as np
from scipy import stats

from entasis.study import statistics
from entasis.study.stopping import Until, needed, standings

ARMS = 4
MOST = 40
DOCS = Path(__file__).parents[1] / "docs" / "studies.md"
RULES: dict[str, dict[str, Any]] = {
    "anytime": {"method": "anytime"},
    "looks at 10, 20, 30, 40 (O'Brien–Fleming)": {"method": "looks"},
    "looks at 10, 20, 30, 40 (Pocock)": {"method": "looks", "spending": "pocock"},
}


def draw(rng: np.random.Generator, effects: list[float], protocols: int, ties: bool) -> dict[str, Any]:
    """Paired differences [seeds] of each arm under each protocol, sd 1."""
    base = rng.normal(0, math.sqrt(1 / 2), MOST)
    own = rng.normal(0, math.sqrt(1 / 4), (len(effects), MOST))
    found = {}
    for p in range(protocols):
        for k, effect in enumerate(effects):
            x = effect + own[k] + rng.normal(0, math.sqrt(1 / 4), MOST) - base
            found[f"{p}.{k}"] = np.round(x, 0) if ties and k % 2 else x
    return found


def end(d: dict[str, Any], until: Until, comparisons: int, margin: float, ended: set[str]) -> dict[str, Any]:
    """How the study ends: (seeds, standing) of each comparison.

    Looks are replayed in their order, as they are when a real study goes on from what it has.
    """
    counts = needed(d, until, comparisons=comparisons, margin=margin, ended=ended)
    have = {name: x[: counts[name]] for name, x in d.items()}
    found = standings(have, until, comparisons=comparisons, margin=margin)
    return {name: (len(have[name]), found[name]) for name in d}


def errors(studies: int) -> list[dict[str, Any]]:
    """How many studies of several kinds make any false claim."""
    rows = []
    margin = 1.0
    kinds = {
        "4 arms, nothing differs": ([0.0] * ARMS, 1, False, False),
        "4 arms, all differ by the margin": ([margin] * ARMS, 1, False, False),
        "4 arms, half and half": ([0.0, 0.0, margin, margin], 1, False, False),
        "4 arms under 3 protocols, nothing differs": ([0.0] * ARMS, 3, False, False),
        "the same with ties and failed seeds": ([0.0] * ARMS, 3, True, True),
    }
    for rule, options in RULES.items():
        for kind, (effects, protocols, ties, failing) in kinds.items():
            wrong = 0
            for i in range(studies):
                rng = np.random.default_rng([1, i])
                d = draw(rng, effects, protocols, ties)
                lost = {n: int(rng.integers(MOST)) for n in d if failing and rng.random() < 0.2}
                until = Until(seeds=MOST, detectable=0.5, **options)
                have = {name: x[: lost.get(name, MOST)] for name, x in d.items()}
                found = end(have, until, len(d), margin, set(lost))
                wrong += any(
                    standing.answer == ("same" if effects[int(name.split(".")[1])] else "differs")
                    for name, (_, standing) in found.items()
                )
            rows.append({"rule": rule, "studies": kind, "false": wrong / studies})
            print(rows[-1], flush=True)
    return rows


def naive(studies: int) -> float:
    """How many studies of one arm without a difference are at p < 0.05 after some seed, looked at after each from 3."""
    x = np.random.default_rng(2).standard_normal((studies * 10, MOST))
    n = np.arange(1, MOST + 1)
    mean = x.cumsum(1) / n
    sd = np.sqrt(((x**2).cumsum(1) - n * mean**2)[:, 2:] / (n[2:] - 1))
    p = 2 * stats.t.sf(np.abs(mean[:, 2:]) / (sd / np.sqrt(n[2:])), n[2:] - 1)
    return float((p < 0.05).any(1).mean())


def price(studies: int) -> list[dict[str, Any]]:
    """Seeds of one arm among 1 or 4, against the fixed number that finds the same effect with the same power."""
    rows = []
    for comparisons in (1, ARMS):
        for effect in (1.0, 1.5, 2.0, 3.0):
            fixed = next(
                n for n in range(3, 99) if statistics.detectable_effect(1.0, n, comparisons) <= effect
            )
            row: dict[str, Any] = {"comparisons": comparisons, "effect": effect, "fixed": fixed}
            for rule, options in RULES.items():
                until = Until(seeds=MOST, detectable=1e-9, **options)
                if options["method"] == "looks":
                    # Planned for this effect: four looks, the last at a third more seeds than are fixed.
                    most = max(5, math.ceil(fixed * 4 / 3))
                    until = Until(seeds=most, detectable=1e-9, **options)
                taken, found = [], 0
                for i in range(studies):
                    x = np.random.default_rng([3, i]).normal(effect, 1, MOST)[: until.seeds]
                    # Among others that are not there: judged at Holm's first step.
                    n, standing = end({"a": x}, until, comparisons, 1e-9, set())["a"]
                    taken.append(n)
                    found += standing.answer == "differs"
                row[rule.split(" at")[0] + rule[rule.find(" (") :] if " (" in rule else rule] = {
                    "most": until.seeds,
                    "mean": float(np.mean(taken)),
                    "for_power_80": int(np.quantile(taken, 0.8, method="inverted_cdf")),
                    "power": found / studies,
                }
            rows.append(row)
            print(row, flush=True)
    return rows


def tables(found: dict[str, Any]) -> str:
    """Both tables in Markdown."""
    kinds = list(dict.fromkeys(r["studies"] for r in found["errors"]))
    rate = {(r["rule"], r["studies"]): r["false"] for r in found["errors"]}
    lines = [
        f"Any false claim, in {found['studies']} simulated studies of each kind (sd of a paired difference 1, margin 1, "
        f"at most {MOST} seeds, `detectable: 0.5`). Stopping at the first p < 0.05 from the third seed on: "
        f"{found['naive']:.1%} with one arm.",
        "",
        f"| rule | {' | '.join(kinds)} |",
        "|---|" + "---|" * len(kinds),
    ]
    lines += [f"| {rule} | " + " | ".join(f"{rate[rule, k]:.1%}" for k in kinds) + " |" for rule in RULES]
    names = [k for k in found["price"][0] if k not in ("comparisons", "effect", "fixed")]
    lines += [
        "",
        "Seeds to find an effect: fixed beforehand for power 0.8, and on average with each rule (its power; for looks, "
        "the most seeds planned).",
        "",
        "| comparisons | effect, sd | fixed | " + " | ".join(names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for r in found["price"]:
        cells = [
            f"{r[n]['mean']:.1f} ({r[n]['power']:.2f}; {'80 % by' if n == 'anytime' else 'of'} "
            f"{r[n]['for_power_80'] if n == 'anytime' else r[n]['most']})"
            for n in names
        ]
        lines.append(f"| {r['comparisons']} | {r['effect']:g} | {r['fixed']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def put(text: str) -> None:
    """Replaces what stands between the marks in docs/studies.md."""
    whole = DOCS.read_text(encoding="utf-8")
    first, last = "<!-- benchmarks/stopping.py -->", "<!-- end of benchmarks/stopping.py -->"
    before, _, rest = whole.partition(first)
    _, _, after = rest.partition(last)
    DOCS.write_text(f"{before}{first}\n{text}\n{last}{after}", encoding="utf-8")


def main() -> None:
    """Simulates, prints, writes results and, if asked, the table in the documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--docs", action="store_true")
    parser.add_argument(
        "--from", type=Path, dest="source", metavar="FILE", help="tables of an earlier result"
    )
    args = parser.parse_args()
    if args.source:
        found = json.loads(args.source.read_text(encoding="utf-8"))
    else:
        statistics.holm([0.5])
        gc.freeze()  # statsmodels collects garbage on every call
        found = {
            "studies": args.studies,
            "naive": naive(args.studies),
            "errors": errors(args.studies),
            "price": price(args.studies),
        }
        common.write("stopping", ["numpy", "scipy", "statsmodels"], **found)
    print(tables(found))
    if args.docs:
        put(tables(found))


if __name__ == "__main__":
    main()
