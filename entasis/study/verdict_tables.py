"""The tables of a study's report, from its verdict."""

from __future__ import annotations

import math
from typing import Any

from entasis.report.tables import Column, Table
from entasis.study import verdict_text
from entasis.study.arms import active_column, shown_active
from entasis.study.verdict import ArmVerdict, ContrastVerdict, Verdict, plain


def rows(verdict: Verdict, protocol: str) -> list[dict[str, Any]]:
    """One flat row an arm: what the tables show."""
    arms = verdict.protocols[protocol].arms
    return [{"arm": name, **plain(arm), **_flat(arm)} for name, arm in arms.items()]


def main_table(verdict: Verdict, protocol: str) -> Table:
    """The answer: score, difference, interval, judgement."""
    return Table(
        [
            Column("arm", "arm"),
            Column("parameters", "parameters", ",d"),
            Column("flops_per_token", "FLOPs/token", ".3e", "training"),
            Column("tokens_per_second", "tokens/s", ",.0f", "one run"),
            Column("bits_per_byte", "bits per byte", ".4f", "mean of seeds"),
            Column("difference_mean", "difference", "+.4f", f"to {verdict.baseline}"),
            *([Column("difference_n", "seeds", "d")] if verdict.until else []),
            Column("interval", *_interval(verdict)),
            Column("short", "judgement"),
        ],
        rows(verdict, protocol),
    )


def contrast_table(verdict: Verdict, protocol: str) -> Table:
    """Arms beside others than the baseline."""
    return Table(
        [
            Column("arm", "arm"),
            Column("against", "against"),
            Column("difference_n", "pairs", "d"),
            Column("difference_mean", "difference", "+.4f"),
            Column("interval", *_interval(verdict)),
            Column("difference_p_holm", "p", ".3g", "Holm"),
            Column("difference_sd", "sd", ".4f", "over seeds"),
            Column("difference_detectable", "known to", ".4f", "±")
            if verdict.until
            else Column("difference_detectable", "detectable", ".4f", "power 0.8"),
            Column("short", "judgement"),
        ],
        [{**plain(c), **_flat(c)} for c in verdict.protocols[protocol].contrasts],
    )


def _flat(part: ArmVerdict | ContrastVerdict) -> dict[str, Any]:
    """A difference as cells of a row."""
    d = part.difference
    known = d is not None and math.isfinite(d.low)
    return {
        **({f"difference_{k}": v for k, v in plain(d).items()} if d else {}),
        "interval": f"{verdict_text.signed(d.low)} … {verdict_text.signed(d.high)}" if d and known else None,
        "short": verdict_text.SHORT[part.judgement],
        **({"trunk_flops": part.trunk.flops} if isinstance(part, ArmVerdict) and part.trunk else {}),
    }


def _interval(verdict: Verdict) -> tuple[str, str, str]:
    if verdict.until:
        return "95 % sequence", "s", "whenever one stops"
    return "95 % interval", "s", "paired by seed"


def statistics_table(verdict: Verdict, protocol: str) -> Table:
    """Everything behind the judgement."""
    if verdict.until:
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
            Column("difference_p_equivalent_holm", "p", ".3g", f"within ±{verdict.margin:g}"),
            Column("difference_p_equivalent_pooled_holm", "p", ".3g", "the same, pooled noise"),
            Column("difference_sd", "sd", ".4f", "over seeds"),
            Column("difference_evaluation_error", "error", ".4f", "documents"),
            Column("difference_total_low", "both: from", "+.4f"),
            Column("difference_total_high", "to", "+.4f"),
            Column("difference_detectable", "detectable", ".4f", "power 0.8"),
        ],
        [row for row in rows(verdict, protocol) if row["arm"] != verdict.baseline],
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
        [row for row in rows(verdict, protocol) if row["arm"] != verdict.baseline],
    )


def cost_table(verdict: Verdict, protocol: str) -> Table:
    """What each arm costs, in every currency."""
    arms = [
        {**row, "active": shown_active(row["active_parameters"] or [])} for row in rows(verdict, protocol)
    ]
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
            *(
                [Column("trunk_flops", "trunk", ".3e", "FLOPs, as expected")]
                if any("trunk_flops" in row for row in arms)
                else []
            ),
            Column("training_loss", "loss", ".4f", "nats, text that was read"),
            Column("tokens_per_second", "tokens/s", ",.0f", "median of seeds"),
            Column("seconds", "seconds", ",.1f", "one run"),
            Column("peak_memory_bytes", "memory", ",.3e", "bytes, process"),
        ],
        arms,
    )


def stage_table(verdict: Verdict, protocol: str) -> Table | None:
    """Bits per byte after each stage, means over seeds; None where no arm has several."""
    staged = [row for row in rows(verdict, protocol) if row["stage_scores"]]
    if not staged:
        return None
    most = max(len(row["stage_scores"]) for row in staged)
    return Table(
        [Column("arm", "arm"), *(Column(f"stage-{i}", f"stage {i}", ".4f") for i in range(1, most + 1))],
        [
            {"arm": row["arm"], **{f"stage-{i}": score for i, score in enumerate(row["stage_scores"], 1)}}
            for row in staged
        ],
    )


def throughput_table(verdict: Verdict) -> Table:
    """How fast the arms were measured to be before the runs at equal time, and what its error is worth."""
    arms = verdict.protocols["time"].arms
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
        [{"arm": name, **plain(arm.throughput)} for name, arm in arms.items() if arm.throughput],
    )


def seeds_table(verdict: Verdict, protocol: str) -> Table:
    """Every run's score."""
    arms = verdict.protocols[protocol].arms
    seeds = verdict.seeds
    return Table(
        [
            Column("arm", "arm"),
            *(Column(f"seed_{s}", f"seed {s}", ".4f") for s in seeds),
            Column("sd", "sd", ".4f"),
        ],
        [{"arm": a, "sd": x.sd, **{f"seed_{s}": x.scores.get(s) for s in seeds}} for a, x in arms.items()],
    )
