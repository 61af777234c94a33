"""From finished runs to the verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from entasis.study import comparisons, growth, results, rounds, statistics, throughput, verdict_text
from entasis.study.comparisons import Control, Pairs
from entasis.study.config import Protocol, Study
from entasis.study.equal_cost import before_run
from entasis.study.plan import Comparison, Plan, PlannedRun
from entasis.study.results import Outcome
from entasis.study.stopping import Standing
from entasis.study.throughput import Speed
from entasis.study.verdict import (
    ArmVerdict,
    ContrastVerdict,
    ControlResult,
    FirstPlan,
    LookResult,
    ProtocolVerdict,
    TrunkCost,
    Verdict,
)


def judge(study: Study, plan: Plan, folder: Path) -> Verdict:
    """Compares every arm with the baseline under each protocol, over the seeds that both have finished."""
    done = results.outcomes(folder, plan.runs)
    failed = results.failures(folder, plan.runs)
    pairs = comparisons.pairs_of(study, plan, done)
    compared = plan.comparisons(study)
    found, standings = comparisons.compare(study, plan, pairs)
    of_protocol = {p: comparisons.controls(study, plan, pairs, p) for p in study.protocols}
    controls = of_protocol[next(iter(plan.grid))]
    asked = rounds.wanted(study, plan, folder, lost=failed)
    protocols = {}
    for p in study.protocols:
        speeds = _speeds(study, plan, folder, done) if p == "time" else {}
        names = {c: name for c, name in compared.items() if c.protocol == p}
        differences = {c: found[name] for c, name in names.items() if name in found}
        looks = {c: _looks(standings[name]) for c, name in names.items() if name in standings}
        if p == "time":
            differences = {
                c: _at_equal_time(d, _speed(plan, folder, done, c.arm, c.against), study.margin)
                for c, d in differences.items()
            }
        here = of_protocol[p]
        if p == "time":
            here = {
                arm: dataclasses.replace(
                    c, difference=_at_equal_time(c.difference, speeds[arm], study.margin)
                )
                if c.difference
                else c
                for arm, c in here.items()
            }
        judging = _Judging(study, plan, p, done, pairs, here, differences, looks, speeds)
        protocols[p] = judging.verdict(failed)
    first = growth.first(folder)
    sentences = _controls_say(study, controls)
    unseen = [text for arm, text in sentences.items() if not controls[arm].seen]
    parts = [
        *unseen,
        *(part.sentence for part in protocols.values()),
        *_how(study, plan, first, asked, found, of_protocol),
        *(text for text in sentences.values() if text not in unseen),
        *_read_again(done),
    ]
    return Verdict(
        study=study.name,
        title=study.title,
        metric="validation bits per byte",
        baseline=study.baseline,
        margin=study.margin,
        seeds=list(dict.fromkeys(run.seed for run in asked.runs)),
        comparisons=len(set(compared.values())),
        until=study.until,
        planned_first=FirstPlan(seeds=first.seeds, arms=list(first.arms), until=first.until)
        if first
        else None,
        controls={
            arm: ControlResult(
                seen=c.seen,
                p_one_sided=_number(c.p),
                margins=c.difference.mean / study.margin if c.difference else None,
            )
            for arm, c in controls.items()
        },
        sentence="\n".join(parts),
        complete=all(run.folder in done for run in asked.runs),
        runs=len(asked.runs),
        finished=len(done),
        failed=failed,
        protocols={str(p): part for p, part in protocols.items()},
    )


def _speeds(study: Study, plan: Plan, folder: Path, done: Mapping[str, Outcome]) -> dict[str, Speed]:
    return {arm: _speed(plan, folder, done, arm, study.baseline) for arm in plan.grid["time"]}


def _speed(plan: Plan, folder: Path, done: Mapping[str, Outcome], arm: str, against: str) -> Speed:
    runs = [done[run.folder] for run in plan.grid["time"][arm] if run.folder in done]
    return throughput.speed(folder, arm, against, runs)


def _controls_say(study: Study, controls: Mapping[str, Control]) -> dict[str, str]:
    return {
        arm: verdict_text.control(
            arm,
            study.baseline,
            c.difference.mean if c.difference else None,
            c.p,
            seen=c.seen,
            margin=study.margin,
        )
        for arm, c in controls.items()
    }


def _how(
    study: Study,
    plan: Plan,
    first: Study | None,
    asked: rounds.Wanted,
    found: Mapping[str, statistics.Difference],
    controls: Mapping[Protocol, Mapping[str, Control]],
) -> list[str]:
    """How a study is judged that adds seeds or has grown, and which comparisons end before a seed that failed."""
    said = []
    if study.until and found:
        numbers = [d.n for d in found.values()]
        planned = len(first.seeds) if first and first.until is None else None
        said.append(verdict_text.method(study.until, (min(numbers), max(numbers)), planned))
    names = {**comparisons.family(study, plan), **plan.controls(study)}
    for name, run in asked.ended.items():
        here = controls[names[name].protocol]
        judged = found.get(name) or (here[names[name].arm].difference if names[name].arm in here else None)
        n = judged.n if judged else 0
        whom = names[name].arm + (
            f" with {names[name].against}" if names[name].against != study.baseline else ""
        )
        said.append(
            f"The comparison of {whom} ends after {n} {'seed' if n == 1 else 'seeds'}, as {run} failed."
        )
    if added := [arm for arm in study.arms if first and arm not in first.arms]:
        said.append(f"Added after the first runs: {verdict_text.listed(added)}.")
    return said


def _read_again(done: Mapping[str, Outcome]) -> list[str]:
    """Which arms read a text more than once, their trunks' part with it."""
    times: dict[str, float] = {}
    for o in done.values():
        for n in o.result.get("epochs", {}).values():
            times[o.run.arm] = max(n, times.get(o.run.arm, 0))
    again = {arm: n for arm, n in times.items() if n > 1}
    if not again:
        return []
    whom = verdict_text.listed(list(again)) if len(again) < 4 else f"{len(again)} arms"
    return [f"A text was read more than once by {whom}, up to {max(again.values()):.2f} times."]


def _looks(standing: Standing) -> list[LookResult]:
    together = {look.n: look for look in standing.together}
    return [
        LookResult(
            n=look.n,
            mean=look.mean,
            low=look.low,
            high=look.high,
            p=look.p,
            together_low=together[look.n].low,
            together_high=together[look.n].high,
        )
        for look in standing.alone
    ]


def _at_equal_time(d: statistics.Difference, speed: Speed, margin: float) -> statistics.Difference:
    return dataclasses.replace(d, length_error=speed.bits_per_byte, margin=margin)


@dataclasses.dataclass(frozen=True, slots=True)
class _Judging:
    """What is known under one protocol."""

    study: Study
    plan: Plan
    protocol: Protocol
    done: Mapping[str, Outcome]
    pairs: Mapping[Comparison, Pairs]
    controls: Mapping[str, Control]
    differences: Mapping[Comparison, statistics.Difference]
    looks: Mapping[Comparison, list[LookResult]]
    speeds: Mapping[str, Speed]

    @property
    def twins(self) -> list[str]:
        pairs = [c for c in self.plan.pairs(self.study) if c.protocol == self.protocol]
        return [c.arm for c in pairs if c.against == self.study.baseline and self.plan.is_twin(c)]

    def verdict(self, failed: Mapping[str, str]) -> ProtocolVerdict:
        """The answer under this protocol; `failed` are folders of runs."""
        study, runs = self.study, self.plan.grid[self.protocol]
        lost = len({run.folder for r in runs.values() for run in r} & set(failed))
        scores = [o.bits_per_byte for o in self._finished(study.baseline)]
        return ProtocolVerdict(
            sentence=verdict_text.verdict(
                {
                    rival: {c.arm: d for c, d in self.differences.items() if c.against == rival}
                    for rival in [study.baseline, *dict.fromkeys(rival for _, rival in study.contrasted)]
                },
                baseline=study.baseline,
                protocol=self.protocol,
                margin=study.margin,
                failed=0 if study.until else lost,
                twins=self.twins,
            ),
            baseline_sd=float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
            paired_sd=_number(
                next((d.noise for c, d in self.differences.items() if c.against == study.baseline), None)
            ),
            arms={arm: self._arm(runs[arm][0]) for arm in study.arms},
            contrasts=[self._contrast(Comparison(self.protocol, *both)) for both in study.contrasted],
        )

    def _contrast(self, c: Comparison) -> ContrastVerdict:
        d = self.differences.get(c)
        judgement, says = self._words(d)
        if self.plan.is_twin(c):
            judgement, says = "itself", f"{c.against} itself: the same shape and recipe"
        return ContrastVerdict(
            arm=c.arm,
            against=c.against,
            judgement=judgement,
            says=says,
            difference=d,
            differences=_by_seed(self.pairs[c]),
            looks=self.looks.get(c),
        )

    def _finished(self, arm: str) -> list[Outcome]:
        runs = self.plan.grid[self.protocol][arm]
        return [self.done[run.folder] for run in runs if run.folder in self.done]

    def _arm(self, run: PlannedRun) -> ArmVerdict:
        """The verdict of the arm that `run` is the first run of."""
        name, arm = run.arm, self.plan.arms[run.arm]
        compared = Comparison(self.protocol, name, self.study.baseline)
        done = self._finished(name)
        scores = [o.bits_per_byte for o in done]
        before = before_run(self.plan.arms, arm)
        spent = [o.flops for o in done]
        difference, judgement, says = self._judge(name)

        def median(key: str) -> float | None:
            return float(np.median([o.result[key] for o in done])) if done else None

        return ArmVerdict(
            parameters=arm.parameters,
            active_parameters=arm.active_parameters,
            flops_per_token=sum(spent) // sum(o.result["tokens"] for o in done)
            if done
            else run.flops // run.tokens,
            layers=arm.final_shape.n_layers,
            distinct_layers=arm.final_shape.distinct_layers,
            tokens=done[0].result["tokens"] if done else None,
            trunk=TrunkCost(name=run.needs.arm, tokens=before[0], flops=before[1]) if run.needs else None,
            training_flops=round(sum(spent) / len(done)) if done else None,
            tokens_per_second=median("tokens_per_second"),
            seconds=median("seconds"),
            peak_memory_bytes=median("peak_memory_bytes"),
            learning_rate_multiplier=done[0].run.multiplier if done else None,
            scores={o.run.seed: o.bits_per_byte for o in done},
            bits_per_byte=float(np.mean(scores)) if scores else None,
            stage_scores=_stage_scores(done),
            training_loss=float(np.mean([o.result["loss"] for o in done])) if done else None,
            sd=float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
            judgement=judgement,
            says=says,
            difference=difference,
            planned_tokens=run.tokens,
            differences=_by_seed(self.pairs.get(compared, [])),
            looks=self.looks.get(compared),
            throughput=self.speeds.get(name),
        )

    def _judge(self, arm: str) -> tuple[statistics.Difference | None, str, str]:
        """The difference to the baseline, the judgement, and the same in words."""
        study, control = self.study, self.controls.get(arm)
        compared = Comparison(self.protocol, arm, study.baseline)
        d = self.differences.get(compared)
        if arm == study.baseline:
            return d, "baseline", "baseline"
        if self.plan.is_twin(compared):
            return d, "itself", f"{study.baseline} itself: the same shape and recipe"
        if control and control.difference:
            seen = "worse, as it must be" if control.seen else "not seen to be worse"
            return control.difference, "seen" if control.seen else "unseen", f"positive control: {seen}"
        return d, *self._words(d)

    def _words(self, d: statistics.Difference | None) -> tuple[str, str]:
        if d:
            return str(verdict_text.judge(d)), verdict_text.says(d, self.study.margin)
        return "missing", "no finished pair"


def _by_seed(pairs: Pairs) -> dict[int, float]:
    return {x.run.seed: x.bits_per_byte - b.bits_per_byte for b, x in pairs}


def _number(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else x


def _stage_scores(done: Sequence[Outcome]) -> list[float] | None:
    """Bits per byte after each of several stages, means over seeds."""
    scores = [[stage["bits_per_byte"] for stage in o.result.get("stages", [])] for o in done]
    lengths = {len(of) for of in scores}
    if len(lengths) != 1 or lengths <= {0, 1} or any(score is None for of in scores for score in of):
        return None
    return [float(mean) for mean in np.mean(scores, axis=0)]
