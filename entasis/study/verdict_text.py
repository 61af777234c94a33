"""Sentences that follow from the numbers, and claim no more than they do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from entasis.study.config import Protocol
from entasis.study.statistics import ALPHA, Difference
from entasis.study.stopping import Until

Judgement = Literal["better", "worse", "same", "undecided", "unjudged", "itself"]
UNIT = "bits per byte"
SHORT: dict[str, str] = {
    "baseline": "baseline",
    "better": "better",
    "worse": "worse",
    "same": "no different",
    "undecided": "none detected",
    "unjudged": "one seed",
    "itself": "the same arm",
    "missing": "no finished run",
    "seen": "control: seen",
    "unseen": "control: NOT seen",
}
"""A judgement in a table's cell."""
EQUAL = {
    "params": "At equal parameters and tokens",
    "flops": "At equal training FLOPs",
    "time": "At equal device time",
    "unmatched": "At unequal cost, every arm as long as its recipe says",
}


def judge(d: Difference) -> Judgement:
    """What one comparison supports, after Holm over all comparisons of the study.

    A difference, and sameness too, is claimed when the arm's own noise and the noise pooled over all arms both
    support it.

    `same` is a demonstrated equivalence (TOST within the margin), `undecided` no difference detected, `unjudged`
    too few seeds for any statement.
    """
    if d.method == "fixed" and math.isnan(d.p_holm):
        return "unjudged"
    if hidden_by_speed(d):
        return "undecided"
    if d.p_holm < ALPHA and not lucky(d):
        return "better" if d.mean < 0 else "worse"
    return "same" if _within(d) else "undecided"


def says(d: Difference, margin: float) -> str:
    """One arm's result in a line."""
    judgement = judge(d)
    if judgement == "unjudged":
        return "one seed: no interval, no judgement" if d.n == 1 else "no pair of runs to compare"
    if judgement in ("better", "worse"):
        small = "; less than the margin" if _within(d) else ""
        single = (
            " on these evaluation documents; their choice alone could explain it"
            if _documents_explain(d)
            else ""
        )
        return f"{judgement} by {amount(d.mean)} {UNIT}{small}{single}"
    if judgement == "same":
        return f"no different within ±{amount(margin)} {UNIT}"
    if hidden_by_speed(d):
        return f"not established: {_speed_error(d)}"
    if lucky(d):
        return (
            f"not established: its {d.n} seeds agree on {signed(d.mean)} (sd {amount(d.sd)}) more closely than the "
            f"noise of all arms (sd {amount(d.noise)}) lets one rely on; add seeds"
        )
    if d.method != "fixed":
        return _known(d)
    hint = " (single interval excludes zero, not after Holm's correction)" if d.p < ALPHA else ""
    return f"no difference detected{hint}; this study could have seen {amount(d.detectable)} {UNIT}"


def verdict(
    differences: Mapping[str, Mapping[str, Difference]],
    *,
    baseline: str,
    protocol: Protocol,
    margin: float,
    failed: int = 0,
    twins: Sequence[str] = (),
) -> str:
    """The study's answer under one protocol, in a sentence or two: the second, on a line of its own, of planned contrasts.

    `differences` are those to the baseline and to each arm that contrasts name; `twins` are arms that are the baseline itself.
    """
    parts = _parts(differences.get(baseline, {}), baseline, margin)
    if twins:
        parts.append(f"{listed(twins)} {_is(twins)} {baseline} itself, of the same shape and recipe")
    pairs = [
        (arm, rival, d)
        for rival, found in differences.items()
        if rival != baseline
        for arm, d in found.items()
    ]
    contrasts = _contrasts(pairs, margin)
    if not parts and not contrasts:
        return f"{EQUAL[protocol]}: nothing to compare yet."
    told = [f"{EQUAL[protocol]}: {'; '.join(parts)}."] if parts else []
    if contrasts:
        told.append(f"Contrasts {EQUAL[protocol][0].lower()}{EQUAL[protocol][1:]}: {'; '.join(contrasts)}.")
    if failed:
        told[-1] += (
            f" {failed} {'run' if failed == 1 else 'runs'} failed and {'is' if failed == 1 else 'are'} left out."
        )
    return "\n".join(told)


def _parts(differences: Mapping[str, Difference], baseline: str, margin: float) -> list[str]:
    """What is to be said of arms that are compared with one other."""
    groups: dict[Judgement, list[str]] = {}
    for name, d in differences.items():
        groups.setdefault(judge(d), []).append(name)
    parts = _claims([(name, baseline, d) for name, d in differences.items()], f" than {baseline}")
    if same := groups.get("same"):
        parts.append(f"{some(same)} {_is(same)} no different from {baseline} within ±{amount(margin)} {UNIT}")
    if undecided := groups.get("undecided"):
        only = len(undecided) == len(differences)
        whom = (
            f"{some(undecided, 'or')} and {baseline}"
            if len(undecided) > 1
            else f"{undecided[0]} and {baseline}"
        )
        start = "no difference detected between" if only else "between"
        end = "" if only else " no difference was detected"
        parts.append(f"{start} {whom}{end}; {_could([differences[name] for name in undecided])}")
        parts += _doubts({name: differences[name] for name in undecided})
    if unjudged := groups.get("unjudged"):
        parts.append(f"{listed(unjudged)} cannot be judged: an interval needs two seeds or more")
    return parts


def _contrasts(pairs: Sequence[tuple[str, str, Difference]], margin: float) -> list[str]:
    """What is to be said of (arm, other arm, difference), each judgement in one part."""
    groups: dict[Judgement, list[tuple[str, str, Difference]]] = {}
    for name, against, d in pairs:
        groups.setdefault(judge(d), []).append((name, against, d))

    def named(judgement: Judgement) -> str:
        return ", ".join(f"{name} and {against}" for name, against, _ in groups.get(judgement, []))

    parts = _claims(pairs, "")
    if same := named("same"):
        parts.append(f"no different within ±{amount(margin)} {UNIT}: {same}")
    if undecided := named("undecided"):
        open_ = groups["undecided"]
        parts.append(f"no difference detected between {undecided}; {_could([d for _, _, d in open_])}")
        parts += _doubts({f"{name} (against {against})": d for name, against, d in open_})
    if unjudged := named("unjudged"):
        parts.append(f"not to be judged, as an interval needs two seeds or more: {unjudged}")
    return parts


def _claims(pairs: Sequence[tuple[str, str, Difference]], than: str) -> list[str]:
    """Who is better or worse than whom. Many are a list, whose intervals stand in the table; `than` is what all are compared
    with."""
    parts = []
    for judgement in ("better", "worse"):
        found = sorted((pair for pair in pairs if judge(pair[2]) == judgement), key=lambda pair: pair[2].mean)
        if len(found) > 3:
            told = ", ".join(
                f"{name}{'' if than else f' than {against}'} by {amount(d.mean)}"
                for name, against, d in found
            )
            parts.append(f"{judgement}{than}, in {UNIT}: {told}")
        else:
            parts += [
                f"{name} is {judgement} than {against} by {amount(d.mean)} {UNIT} (95 % interval {span(d)})"
                for name, against, d in found
            ]
    return parts


def _doubts(undecided: Mapping[str, Difference]) -> list[str]:
    """Of differences that are not established, why they are not."""
    parts = [
        f"{name} differs by {signed(d.mean)}, but {_speed_error(d)}"
        for name, d in undecided.items()
        if hidden_by_speed(d)
    ]
    agree = {name: d for name, d in undecided.items() if lucky(d) and not hidden_by_speed(d)}
    if agree:
        first, *others = (f"{name} {{}} {signed(d.mean)}" for name, d in agree.items())
        told = ", those of ".join([first.format("agree on"), *(other.format("on") for other in others)])
        parts.append(
            f"the seeds of {told}, but more closely than the noise of all arms lets one rely on: add seeds"
        )
    return parts


def lucky(d: Difference) -> bool:
    """Significant by the arm's own few seeds, yet not by the noise that all arms show together."""
    return d.p_holm < ALPHA <= d.p_pooled_holm


def hidden_by_speed(d: Difference) -> bool:
    """At equal time: whether the error of the measured speeds, which set the lengths, could undo a claim, or is unknown."""
    if d.p_holm < ALPHA and not lucky(d):
        return not d.length_error < abs(d.mean)
    return _within(d) and not d.length_error < d.margin


def _speed_error(d: Difference) -> str:
    if math.isnan(d.length_error):
        return "how well its speed was measured is not known"
    return f"the error of its measured speed alone is worth {amount(d.length_error)} {UNIT}"


def _known(d: Difference) -> str:
    """What is known of a comparison that is neither decided nor shown to be without a difference."""
    if d.together_low > d.together_high:
        return (
            "not established: the intervals of its seeds contradict one another, as one study in twenty may"
        )
    if math.isinf(d.detectable):
        return f"nothing can be said after {d.n} {'seed' if d.n == 1 else 'seeds'}"
    return f"no difference detected; known to ±{amount(d.detectable)} {UNIT}"


def _could(undecided: Sequence[Difference]) -> str:
    most = max(d.detectable for d in undecided)
    if all(d.method == "fixed" for d in undecided):
        return f"this study could have seen {amount(most)} {UNIT}"
    if math.isinf(most):
        return "the seeds are too few, or contradict one another"
    return f"known to ±{amount(most)} {UNIT}"


def control(
    name: str, baseline: str, mean: float | None, p: float | None, *, seen: bool, margin: float
) -> str:
    """What the study says of its positive control, an arm that must be worse."""
    if mean is None:
        return f"Its positive control {name} has no finished pair, so what this study can see is not known."
    if seen:
        return (
            f"The positive control {name} is worse than {baseline} by {amount(mean)} {UNIT} ({mean / margin:.1f} margins), "
            "as it must be."
        )
    told = "" if p is None else f", one-sided p {p:.2g}"
    return (
        f"This study cannot see anything: not even that its positive control {name} is worse than {baseline} (it differs by "
        f"{signed(mean)}{told}). Where no difference was detected, one may well be there."
    )


def method(until: Until, seeds: tuple[int, int], first: int | None) -> str:
    """How a study that adds seeds is judged; `first` is how many it was planned with before it was grown."""
    used = f"{seeds[0]}" if seeds[0] == seeds[1] else f"{seeds[0]} to {seeds[1]}"
    if until.method == "looks":
        return f"Judged at planned looks, after {used} seeds."
    grown = f"; planned with {first} seeds, of which no p is claimed" if first is not None else ""
    return f"Judged by the anytime-valid t after {used} seeds{grown}."


def _within(d: Difference) -> bool:
    if d.method != "fixed":
        return d.inside
    return d.p_equivalent_holm < ALPHA and d.p_equivalent_pooled_holm < ALPHA


def amount(x: float) -> str:
    """A size without sign: four decimals, or three significant digits where that shows more."""
    x = abs(x)
    return f"{x:.4f}" if x >= 0.001 or x == 0 else f"{x:.2g}"


def signed(x: float) -> str:
    """`−0.0123`, `+0.0045`."""
    return f"{x:+.4f}".replace("-", "−")


def span(d: Difference) -> str:
    """`−0.0123 to 0.0045`."""
    return f"{signed(d.low)} to {signed(d.high)}"


def listed(names: Sequence[str], word: str = "and") -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


def some(names: Sequence[str], word: str = "and") -> str:
    """`listed`, of more than six the first three: `a, b, c and 9 others`."""
    return listed(names if len(names) <= 6 else [*names[:3], f"{len(names) - 3} others"], word)


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _documents_explain(d: Difference) -> bool:
    return not math.isnan(d.total_low) and d.total_low <= 0 <= d.total_high
