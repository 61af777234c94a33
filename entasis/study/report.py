"""The study's report: `report.html`, and every chart and table of it as files for a paper."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from entasis.files import write_bytes, write_text
from entasis.progress import duration
from entasis.report import charts, silhouettes
from entasis.report.page import Page
from entasis.report.tables import Column, Table
from entasis.study import downstream, results, training_curves, trajectory, validation_curves, verdict_tables
from entasis.study import verdict as verdicts
from entasis.study.config import Study
from entasis.study.plan import Plan, PlannedRun
from entasis.study.results import Outcome
from entasis.study.verdict import ProtocolVerdict, Verdict, plain
from entasis.study.verdict_text import EQUAL


def write(
    study: Study, plan: Plan, folder: Path, verdict: Verdict, prepared: Sequence[PlannedRun] = ()
) -> Path:
    """Writes `verdict.json`, `report.html`, `tables/` and `charts/` into the study's folder."""
    done = list(results.outcomes(folder, plan.runs).values())
    page = Page(study.title, subtitle=_subtitle(study, verdict))
    page.verdict(verdict.sentence)
    page.section("The arms", *_columns(page, study, plan, folder))
    for protocol in study.protocols:
        heading = f"Differences: {EQUAL[protocol][0].lower()}{EQUAL[protocol][1:]}"
        page.section(heading, *_differences(page, study, verdict, protocol, folder))
    if done:
        order = _order(study, done)
        page.section(
            "Loss as training goes", *training_curves.section(page, study.baseline, plan, done, order, folder)
        )
        held_out = validation_curves.section(page, done, order, folder)
        if study.downstream:
            held_out += _downstream(page, study, plan, folder)
        if held_out:
            page.section("Held-out text and tasks" if study.downstream else "Held-out text", *held_out)
    for protocol in study.protocols:
        page.section(
            f"Cost: {EQUAL[protocol][0].lower()}{EQUAL[protocol][1:]}",
            *_cost(page, study, verdict, protocol, folder),
        )
    if study.sweep:
        page.section("Learning rates", *_sweep(page, study, prepared, folder))
    if verdict.planned_first:
        first = verdict.planned_first
        planned = {
            "seeds": ", ".join(map(str, first.seeds)),
            "arms": ", ".join(first.arms),
            "judged by": "the t test for this number of seeds"
            if first.until is None
            else str(plain(first.until)),
        }
        said = "This study has grown after its first runs. What is claimed above is judged as it is now."
        page.section("What was planned first", page.facts(planned), page.note(said))
    if verdict.failed:
        page.section("Failed runs", page.facts(verdict.failed))
    page.section("To repeat this", *_repeat(page, study, done))
    page.write(folder / "report.html")
    # Last: a verdict on disk means that the report beside it is whole.
    verdicts.write(folder, verdict)
    return folder / "report.html"


def _subtitle(study: Study, verdict: Verdict) -> str:
    runs = f"{verdict.finished} of {verdict.runs} runs finished · " if not verdict.complete else ""
    return f"{runs}{len(study.arms)} arms × {_seeds(study, verdict)} seeds · baseline {study.baseline} · lower is better"


def _seeds(study: Study, verdict: Verdict) -> str:
    if study.until is None:
        return str(len(study.seeds))
    return f"up to {len(verdict.seeds)} of {study.until.seeds}"


def _columns(page: Page, study: Study, plan: Plan, folder: Path) -> list[str]:
    shapes = [(name, arm.final_shape) for name, arm in plan.arms.items()]
    scale = silhouettes.widest([shape for _, shape in shapes])
    drawn = [
        (
            silhouettes.silhouette(shape, scale=scale),
            name,
            f"{plan.arms[name].parameters / 1e6:,.2f} M parameters",
        )
        for name, shape in shapes
    ]
    figure = silhouettes.figure(shapes)
    import vl_convert

    write_text(folder / "charts" / "silhouettes.svg", figure)
    write_bytes(folder / "charts" / "silhouettes.pdf", vl_convert.svg_to_pdf(figure))
    notes = [page.note(f"{name}: {note}") for name, arm in plan.arms.items() for note in arm.notes]
    return [page.columns(drawn, silhouettes.KEY), *notes]


def _differences(page: Page, study: Study, verdict: Verdict, protocol: str, folder: Path) -> list[str]:
    part = verdict.protocols[protocol]
    rows = [
        {
            "arm": name,
            **{k: plain(arm.difference)[k] for k in ("mean", "low", "high", "total_low", "total_high")},
            "values": {f"seed {s}": v for s, v in arm.differences.items()},
            "says": arm.says,
        }
        for name, arm in part.arms.items()
        if arm.difference
    ]
    blocks: list[str] = []
    if rows:
        title = f"difference to {study.baseline}, bits per byte"
        chart = charts.forest(rows, title=title, order=list(study.arms), margin=study.margin)
        charts.save(chart, folder / "charts" / f"differences-{protocol}")
        blocks += [
            page.chart(chart),
            page.note(
                f"Dot: mean difference. Thick line: {_interval(study)}. Thin line: with the error "
                f"from the choice of evaluation documents added. Ticks: single seeds. Grey band: ±{study.margin:g}, "
                "smaller than what matters here."
            ),
        ]
    main = verdict_tables.main_table(verdict, protocol)
    blocks += [
        page.table(_save(main, folder, f"results-{protocol}")),
        *_contrasts(page, verdict, protocol, folder),
        *_noise(page, study, part, verdict.comparisons),
        *(trajectory.chart(page, study, verdict, protocol, folder) if study.until else []),
    ]
    points = [
        {"arm": name, "seed": f"seed {seed}", "score": score, "place": i}
        for i, (name, arm) in enumerate(part.arms.items())
        for seed, score in arm.scores.items()
    ]
    if points:
        dots = charts.slopes(
            points, y="score", y_title="bits per byte", series="arm", repeat="seed", order=list(study.arms)
        )
        charts.save(dots, folder / "charts" / f"runs-{protocol}")
        blocks += [page.chart(dots), page.note("Every run; runs of one seed are joined.")]
    tables = [
        page.table(
            _save(verdict_tables.statistics_table(verdict, protocol), folder, f"statistics-{protocol}")
        ),
        page.table(_save(verdict_tables.seeds_table(verdict, protocol), folder, f"seeds-{protocol}")),
    ]
    if study.until:
        tables.append(page.table(_save(trajectory.table(verdict, protocol), folder, f"looks-{protocol}")))
    return [*blocks, page.folded("All statistics, and every run's score", *tables)]


def _contrasts(page: Page, verdict: Verdict, protocol: str, folder: Path) -> list[str]:
    if not verdict.protocols[protocol].contrasts:
        return []
    table = verdict_tables.contrast_table(verdict, protocol)
    said = "Contrasts that the study names: arms beside others than the baseline, corrected (Holm) together with the rest."
    return [page.table(_save(table, folder, f"contrasts-{protocol}")), page.note(said)]


def _interval(study: Study) -> str:
    if study.until is None:
        return "95 % interval over seeds, paired (t)"
    return "95 % interval that holds whenever one stops adding seeds (none: too few seeds yet)"


def _noise(page: Page, study: Study, part: ProtocolVerdict, comparisons: int) -> list[str]:
    found = [arm.difference for arm in part.arms.values() if arm.difference]
    if part.paired_sd is None or part.baseline_sd is None:
        alone = found and all(d.n == 1 for d in found)
        said = "With one seed there is no interval; give the study two seeds or more."
        return [page.note(said)] if alone else []
    noise = (
        f"Noise: sd of {study.baseline} over seeds {part.baseline_sd:.4f}, of a paired difference "
        f"{part.paired_sd:.4f} (pooled over arms)."
    )
    # Of the arm with the fewest pairs, as noise is pooled.
    known = [d for d in found if math.isfinite(d.detectable)]
    seen = max(known, key=lambda d: d.detectable, default=None)
    if study.until or seen is None:
        return [page.note(noise)]
    text = (
        f"{noise} With {seen.n} pairs and {comparisons} "
        f"{'comparison' if comparisons == 1 else 'comparisons'} (Holm), a true difference of {seen.detectable:.4f} would be found with probability 0.8."
    )
    return [page.note(text)]


def _order(study: Study, done: list[Outcome]) -> list[str]:
    """Labels of runs, in the order of the arms."""
    labels = dict.fromkeys(o.label for o in done)
    return sorted(labels, key=lambda label: list(study.arms).index(label.split("@")[0]))


def _downstream(page: Page, study: Study, plan: Plan, folder: Path) -> list[str]:
    table = downstream.table(plan, results.outcomes(folder, plan.runs), study.baseline)
    if not table.rows:
        return [page.note(f"Downstream tasks are not scored yet. {downstream.MISSING}")]
    said = "Downstream tasks, by lm-eval. Higher is better for acc, lower for perplexities; no part of the verdict."
    return [page.table(_save(table, folder, "downstream")), page.note(said)]


def _cost(page: Page, study: Study, verdict: Verdict, protocol: str, folder: Path) -> list[str]:
    table = verdict_tables.cost_table(verdict, protocol)
    if protocol == "time":
        speeds = page.table(_save(verdict_tables.throughput_table(verdict), folder, "throughput"))
        said = (
            "Before the runs, all arms trained some steps in turn, round after round. The error of an arm's speed against "
            "the baseline's, which set its length, is worth so many bits per byte by the slope of its loss over tokens; a "
            "difference no larger than that is not claimed."
        )
        blocks = [speeds, page.note(said)]
    else:
        blocks = []
    if stages := verdict_tables.stage_table(verdict, protocol):
        scores = page.table(_save(stages, folder, f"stages-{protocol}"))
        blocks.append(page.folded("Bits per byte after each stage, means over seeds", scores))
    return [
        *blocks,
        page.table(_save(table, folder, f"cost-{protocol}")),
        page.note(
            "FLOPs are of the matrix products, attention counted over the full sequence, training as three times "
            "forward. Tokens/s is of one run, with as many others beside it as the study ran at once."
        ),
    ]


def _sweep(page: Page, study: Study, prepared: Sequence[PlannedRun], folder: Path) -> list[str]:
    done = list(results.outcomes(folder, prepared).values())
    rows = []
    for arm in study.arms:
        scores = results.sweep_scores(done, arm, study.sweep)
        best = min(scores, key=lambda m: scores[m]) if scores else None
        rows += [
            {"arm": arm, "multiplier": m, "score": s, "chosen": "chosen" if m == best else ""}
            for m, s in scores.items()
        ]
    table = Table(
        [Column("arm", "arm"), Column("multiplier", "learning rate", "g", "× base"),
         Column("score", "bits per byte", ".4f"), Column("chosen", "")],
        rows,
    )  # fmt: skip
    blocks: list[str] = []
    if rows:
        points = [{**r, "seed": "mean"} for r in rows]
        chart = charts.lines(
            points, x="multiplier", x_title="learning rate, × base", y="score", y_title="bits per byte",
            series="arm", repeat="seed", order=list(study.arms), log_x=True, x_format="g",
        )  # fmt: skip
        charts.save(chart, folder / "charts" / "learning-rate")
        blocks = [page.chart(chart)]
        edges = {min(study.sweep.multipliers), max(study.sweep.multipliers)} if study.sweep else set()
        at_edge = [str(r["arm"]) for r in rows if r["chosen"] and r["multiplier"] in edges]
        if at_edge:
            blocks.append(
                page.note(f"Chosen at the edge of the sweep, so it may be too narrow: {', '.join(at_edge)}.")
            )
        if flips := _flips(study, rows):
            blocks.append(
                page.note(
                    f"Distrust: against {study.baseline} the sign flips inside the sweep for {', '.join(flips)}."
                )
            )
    if study.sweep:
        blocks.append(
            page.note(
                f"Chosen on {len(study.sweep.seeds)} other seeds and on a third of the held-out documents, drawn by "
                "hash; the verdict is on the rest."
            )
        )
        lost = [
            f"{arm} × {m:g}"
            for arm in study.arms
            if arm not in study.controls
            for m in study.sweep.multipliers
            if m not in results.sweep_scores(done, arm, study.sweep)
        ]
        if lost:
            blocks.append(page.note(f"Not finished for every seed, so not to be chosen: {', '.join(lost)}."))
    return [*blocks, page.folded("All of the sweep", page.table(_save(table, folder, "learning-rates")))]


def _flips(study: Study, rows: list[dict[str, Any]]) -> list[str]:
    """Arms that are better than the baseline at one learning rate and worse at another."""
    base = {r["multiplier"]: r["score"] for r in rows if r["arm"] == study.baseline}
    result = []
    for arm in study.arms:
        signs = {
            np.sign(r["score"] - base[r["multiplier"]])
            for r in rows
            if r["arm"] == arm and r["multiplier"] in base
        }
        if {1.0, -1.0} <= signs:
            result.append(arm)
    return result


def _repeat(page: Page, study: Study, done: list[Outcome]) -> list[str]:
    blocks: list[str] = [page.command("entasis study run study.yaml")]
    if done:
        seconds = sum(o.result["seconds"] for o in done)
        facts = _differing([_surroundings(o.environment()) for o in done])
        blocks.append(page.facts({**facts, "training time, all runs": duration(seconds)}))
    return [*blocks, page.folded("study.yaml", page.command(study.to_yaml()))]


def _surroundings(environment: dict[str, Any]) -> dict[str, str]:
    return {
        "device": environment["device"],
        "threads of one run": str(environment["threads"]),
        "precision": environment["precision"],
        "compiled": "yes" if environment["compile"] else "no",
        "platform": environment["platform"],
        "versions": ", ".join(f"{k} {v}" for k, v in environment["versions"].items()),
        **{f"{k} fingerprint": v for k, v in environment["data"].items()},
    }


def _differing(runs: list[dict[str, str]]) -> dict[str, str]:
    """Each fact of the runs, with the number of runs for each value where they differ."""
    result = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        values = Counter(run.get(name, "none") for run in runs)
        several = len(values) > 1
        result[name] = "; ".join(
            f"{value} ({n} of {len(runs)} runs)" if several else value for value, n in values.items()
        )
    return result


def _save(table: Table, folder: Path, name: str) -> Table:
    write_text(folder / "tables" / f"{name}.csv", table.csv())
    write_text(folder / "tables" / f"{name}.tex", table.latex())
    return table
