"""From finished runs to the verdict: `verdict.json` and the rows of every table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from entasis.report.tables import Column, Table
from entasis.study import comparisons, growth, results, rounds, statistics, throughput, verdict_text
from entasis.study.arms import active_column, shown_active
from entasis.study.comparisons import Pairs
from entasis.study.config import Protocol, Study
from entasis.study.equal_cost import before_run
from entasis.study.plan import Plan, PlannedRun
from entasis.study.results import Outcome
from entasis.study.stopping import Standing

Verdict = dict[str, Any]
"""What `verdict.json` holds: plain values, NaN as null."""


def judge(study: Study, plan: Plan, folder: Path) -> Verdict:
    """Compares every arm with the baseline under each protocol, over the seeds that both have finished."""
    done = results.outcomes(folder, plan.runs)
    failed = results.failures(folder, plan.runs)
    pairs = comparisons.pairs_of(study, plan, done)
    compared = plan.comparisons(study.baseline)
    found, standings = comparisons.compare(study, plan, pairs)
    controls = comparisons.controls(study, plan, pairs)
    asked = rounds.wanted(study, plan, folder, lost=failed)
    speeds: dict[str, dict[str, Any]] = {}
    if "time" in study.protocols:
        for arm, runs in plan.grid["time"].items():
            mine = [done[r.folder] for r in runs if r.folder in done]
            speeds[arm] = throughput.error(folder, arm, study.baseline, mine)
    protocols = {
        p: _under(
            study,
            plan,
            p,
            done,
            failed,
            pairs[p],
            controls,
            {
                arm: _at_equal_time(found[name], speeds[arm], study.margin) if p == "time" else found[name]
                for (q, arm), name in compared.items()
                if q == p and name in found
            },
        )
        for p in study.protocols
    }
    for (p, arm), name in compared.items():
        if name in standings:
            protocols[p]["arms"][arm]["looks"] = _looks(standings[name])
    for arm, speed in speeds.items():
        protocols["time"]["arms"][arm]["throughput"] = {k: _plain(v) for k, v in speed.items()}
    first = growth.first(folder)
    sentences = _controls_say(study, controls)
    unseen = [text for arm, text in sentences.items() if not controls[arm]["seen"]]
    parts = [
        *unseen,
        *(part["sentence"] for part in protocols.values()),
        *_how(study, plan, first, asked, found),
        *(text for text in sentences.values() if text not in unseen),
    ]
    return {
        "study": study.name,
        "title": study.title,
        "metric": "validation bits per byte",
        "baseline": study.baseline,
        "margin": study.margin,
        "seeds": list(dict.fromkeys(run.seed for run in asked.runs)),
        "comparisons": len(set(compared.values())),
        "until": dataclasses.asdict(study.until) if study.until else None,
        "planned_first": _planned(first) if first else None,
        "controls": {
            arm: {
                "seen": c["seen"],
                "p_one_sided": None if c["p"] is None else _plain(c["p"]),
                "margins": c["difference"].mean / study.margin if c["difference"] else None,
            }
            for arm, c in controls.items()
        },
        "sentence": " ".join(parts),
        "complete": all(run.folder in done for run in asked.runs),
        "runs": len(asked.runs),
        "finished": len(done),
        "failed": failed,
        "protocols": protocols,
    }


def _controls_say(study: Study, controls: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {
        arm: verdict_text.control(
            arm,
            study.baseline,
            c["difference"].mean if c["difference"] else None,
            c["p"],
            seen=c["seen"],
            margin=study.margin,
        )
        for arm, c in controls.items()
    }


def _planned(first: Study) -> dict[str, Any]:
    """What was planned before the first run, of what may change afterwards."""
    until = dataclasses.asdict(first.until) if first.until else None
    return {"seeds": first.seeds, "arms": list(first.arms), "until": until}


def _how(
    study: Study,
    plan: Plan,
    first: Study | None,
    asked: rounds.Wanted,
    found: Mapping[str, statistics.Difference],
) -> list[str]:
    """How a study is judged that adds seeds or has grown, and which comparisons end before a seed that failed."""
    said = []
    if study.until and found:
        numbers = [d.n for d in found.values()]
        planned = len(first.seeds) if first and first.until is None else None
        said.append(verdict_text.method(study.until, (min(numbers), max(numbers)), planned))
    names = {**comparisons.family(study, plan), **plan.controls(study.baseline)}
    for name, run in asked.ended.items():
        n = found[name].n if name in found else 0
        said.append(
            f"The comparison of {names[name][1]} ends after {n} {'seed' if n == 1 else 'seeds'}, as {run} failed."
        )
    if added := [arm for arm in study.arms if first and arm not in first.arms]:
        said.append(f"Added after the first runs: {verdict_text.listed(added)}.")
    return said


def _looks(standing: Standing) -> list[dict[str, Any]]:
    """What was known after each look: alone, and together with the other comparisons."""
    together = {look.n: look for look in standing.together}
    return [
        {k: _plain(v) for k, v in dataclasses.asdict(look).items()}
        | {"together_low": _plain(together[look.n].low), "together_high": _plain(together[look.n].high)}
        for look in standing.alone
    ]


def _at_equal_time(d: statistics.Difference, speed: dict[str, Any], margin: float) -> statistics.Difference:
    return dataclasses.replace(d, length_error=speed["bits_per_byte"], margin=margin)


def _under(
    study: Study,
    plan: Plan,
    protocol: Protocol,
    done: dict[str, Outcome],
    failed: dict[str, str],
    pairs: dict[str, Pairs],
    controls: Mapping[str, Mapping[str, Any]],
    differences: dict[str, statistics.Difference],
) -> dict[str, Any]:
    runs = plan.grid[protocol]
    twins = plan.twins(protocol, study.baseline)
    lost = len({run.folder for r in runs.values() for run in r} & set(failed))
    sentence = verdict_text.verdict(
        differences,
        baseline=study.baseline,
        protocol=protocol,
        margin=study.margin,
        failed=0 if study.until else lost,
        twins=twins,
    )
    scores = [done[r.folder].bits_per_byte for r in runs[study.baseline] if r.folder in done]
    return {
        "sentence": sentence,
        "baseline_sd": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
        "paired_sd": _plain(next((d.noise for d in differences.values()), math.nan)),
        "arms": {
            arm: _arm(
                study,
                plan,
                runs[arm][0],
                [done[r.folder] for r in runs[arm] if r.folder in done],
                differences.get(arm),
                arm in twins,
                controls.get(arm),
            )
            | {"planned_tokens": runs[arm][0].tokens}
            | {"differences": {x.run.seed: x.bits_per_byte - b.bits_per_byte for b, x in pairs.get(arm, [])}}
            for arm in study.arms
        },
    }


def _arm(
    study: Study,
    plan: Plan,
    run: PlannedRun,
    done: list[Outcome],
    d: statistics.Difference | None,
    is_twin: bool,
    control: Mapping[str, Any] | None,
) -> dict[str, Any]:
    name, arm = run.arm, plan.arms[run.arm]
    if name == study.baseline:
        judgement = says = "baseline"
    elif is_twin:
        judgement, says = "itself", f"{study.baseline} itself: the same shape and recipe"
    elif control and control["difference"]:
        d = control["difference"]
        judgement = "seen" if control["seen"] else "unseen"
        says = f"positive control: {'worse, as it must be' if control['seen'] else 'not seen to be worse'}"
    elif d:
        judgement, says = str(verdict_text.judge(d)), verdict_text.says(d, study.margin)
    else:
        judgement, says = "missing", "no finished pair"
    scores = [o.bits_per_byte for o in done]
    before = before_run(plan.arms, arm)

    def middle(key: str) -> float | None:
        return float(np.median([o.result[key] for o in done])) if done else None

    return {
        "parameters": arm.parameters,
        "active_parameters": arm.active_parameters,
        "flops_per_token": run.flops // run.tokens,
        "layers": arm.final_shape.n_layers,
        "distinct_layers": arm.final_shape.distinct_layers,
        "tokens": done[0].result["tokens"] if done else None,
        "trunk": {"name": run.needs.arm, "tokens": before[0], "flops": before[1]} if run.needs else None,
        "training_flops": run.flops if done else None,
        "tokens_per_second": middle("tokens_per_second"),
        "seconds": middle("seconds"),
        "peak_memory_bytes": middle("peak_memory_bytes"),
        "learning_rate_multiplier": done[0].run.multiplier if done else None,
        "scores": {o.run.seed: o.bits_per_byte for o in done},
        "bits_per_byte": float(np.mean(scores)) if scores else None,
        "sd": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
        "judgement": judgement,
        "says": says,
        "difference": {k: _plain(v) for k, v in dataclasses.asdict(d).items()} if d else None,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rows(verdict: Verdict, protocol: str) -> list[dict[str, Any]]:
    """One flat row an arm: what the tables show."""
    result = []
    for name, arm in verdict["protocols"][protocol]["arms"].items():
        d = arm["difference"] or {}
        interval = None
        if d.get("low") is not None:
            interval = f"{verdict_text.signed(d['low'])} … {verdict_text.signed(d['high'])}"
        flat = {k: v for k, v in arm.items() if k not in ("scores", "differences", "difference")}
        flat["short"] = verdict_text.SHORT[arm["judgement"]]
        result.append(
            {"arm": name, **flat, **{f"difference_{k}": v for k, v in d.items()}, "interval": interval}
        )
    return result


def main_table(verdict: Verdict, protocol: str) -> Table:
    """The answer: score, difference, interval, judgement."""
    return Table(
        [
            Column("arm", "arm"),
            Column("parameters", "parameters", ",d"),
            Column("flops_per_token", "FLOPs/token", ".3e", "training"),
            Column("tokens_per_second", "tokens/s", ",.0f", "one run"),
            Column("bits_per_byte", "bits per byte", ".4f", "mean of seeds"),
            Column("difference_mean", "difference", "+.4f", f"to {verdict['baseline']}"),
            *([Column("difference_n", "seeds", "d")] if verdict.get("until") else []),
            Column("interval", *_interval(verdict)),
            Column("short", "judgement"),
        ],
        rows(verdict, protocol),
    )


def _interval(verdict: Verdict) -> tuple[str, str, str]:
    if verdict.get("until"):
        return "95 % sequence", "s", "whenever one stops"
    return "95 % interval", "s", "paired by seed"


def statistics_table(verdict: Verdict, protocol: str) -> Table:
    """Everything behind the judgement."""
    if verdict.get("until"):
        return _sequence_table(verdict, protocol)
    return Table(
        [
            Column("arm", "arm"),
            Column("difference_n", "pairs", "d"),
            Column("difference_mean", "difference", "+.4f"),
            Column("difference_low", "95 % from", "+.4f"),
            Column("difference_high", "to", "+.4f"),
            Column("difference_p", "p", ".3g"),
            Column("difference_p_holm", "p", ".3g", "Holm"),
            Column("difference_p_pooled_holm", "p", ".3g", "Holm, pooled noise"),
            Column("difference_p_equivalent_holm", "p", ".3g", f"within ±{verdict['margin']:g}"),
            Column("difference_p_equivalent_pooled_holm", "p", ".3g", "the same, pooled noise"),
            Column("difference_sd", "sd", ".4f", "over seeds"),
            Column("difference_evaluation_error", "error", ".4f", "documents"),
            Column("difference_total_low", "both: from", "+.4f"),
            Column("difference_total_high", "to", "+.4f"),
            Column("difference_detectable", "detectable", ".4f", "power 0.8"),
        ],
        [row for row in rows(verdict, protocol) if row["arm"] != verdict["baseline"]],
    )


def _sequence_table(verdict: Verdict, protocol: str) -> Table:
    """Everything behind the judgement of a study that adds seeds."""
    return Table(
        [
            Column("arm", "arm"),
            Column("difference_n", "pairs", "d"),
            Column("difference_mean", "difference", "+.4f"),
            Column("difference_low", "95 % from", "+.4f", "this arm alone"),
            Column("difference_high", "to", "+.4f"),
            Column("difference_p", "p", ".3g", "whenever one stops"),
            Column("difference_p_holm", "p", ".3g", "Holm"),
            Column("difference_together_low", "95 % from", "+.4f", "all comparisons"),
            Column("difference_together_high", "to", "+.4f"),
            Column("difference_detectable", "known to", ".4f", "±"),
            Column("difference_sd", "sd", ".4f", "over seeds"),
            Column("difference_evaluation_error", "error", ".4f", "documents"),
            Column("difference_total_low", "both: from", "+.4f"),
            Column("difference_total_high", "to", "+.4f"),
        ],
        [row for row in rows(verdict, protocol) if row["arm"] != verdict["baseline"]],
    )


def cost_table(verdict: Verdict, protocol: str) -> Table:
    """What each arm costs, in every currency."""
    arms = [{**row, "active": shown_active(row["active_parameters"])} for row in rows(verdict, protocol)]
    return Table(
        [
            Column("arm", "arm"),
            Column("parameters", "parameters", ",d"),
            *active_column(arms),
            Column("layers", "layers", "d"),
            Column("distinct_layers", "distinct", "d", "layer shapes"),
            Column("flops_per_token", "FLOPs/token", ".3e", "training"),
            Column("tokens", "tokens", ",d"),
            Column("training_flops", "training", ".3e", "FLOPs"),
            Column("tokens_per_second", "tokens/s", ",.0f", "median of seeds"),
            Column("seconds", "seconds", ",.1f", "one run"),
            Column("peak_memory_bytes", "memory", ",.3e", "bytes, process"),
        ],
        arms,
    )


def throughput_table(verdict: Verdict) -> Table:
    """How fast the arms were measured to be before the runs at equal time, and what its error is worth."""
    arms = verdict["protocols"]["time"]["arms"]
    return Table(
        [
            Column("arm", "arm"),
            Column("tokens_per_second", "tokens/s", ",.0f", "mean of rounds"),
            Column("slowest", "slowest", ",.0f", "round"),
            Column("fastest", "fastest", ",.0f", "round"),
            Column("rounds", "rounds", "d"),
            Column("relative_error", "error", ".2%", "± 95 %, to baseline"),
            Column("slope", "slope", ".4f", "bits per byte, × e tokens"),
            Column("bits_per_byte", "worth", ".4f", "± bits per byte"),
        ],
        [{"arm": name, **arm["throughput"]} for name, arm in arms.items()],
    )


def seeds_table(verdict: Verdict, protocol: str) -> Table:
    """Every run's score."""
    arms = verdict["protocols"][protocol]["arms"]
    seeds = verdict["seeds"]
    return Table(
        [
            Column("arm", "arm"),
            *(Column(f"seed_{s}", f"seed {s}", ".4f") for s in seeds),
            Column("sd", "sd", ".4f"),
        ],
        [
            {"arm": a, "sd": x["sd"], **{f"seed_{s}": x["scores"].get(s) for s in seeds}}
            for a, x in arms.items()
        ],
    )
