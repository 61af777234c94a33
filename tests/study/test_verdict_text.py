"""The sentences claim what the numbers support, and no more."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from entasis.study import statistics, stopping, verdict_text
from entasis.study.stopping import Until


def difference(values: list[float], margin: float = 0.01, error: float = 0.0) -> statistics.Difference:
    return compared({"a": values}, margin=margin, evaluation_errors={"a": error})["a"]


def compared(values: Any, **options: Any) -> dict[str, statistics.Difference]:
    return statistics.adjust(statistics.compare(values, **options))


def test_no_difference_names_what_could_have_been_seen() -> None:
    d = difference([0.01, -0.012, 0.004])
    text = verdict_text.says(d, 0.01)
    assert verdict_text.judge(d) == "undecided"
    assert text == f"no difference detected; this study could have seen {d.detectable:.4f} bits per byte"
    assert "equal" not in text


def test_clear_differences_are_better_or_worse() -> None:
    assert verdict_text.judge(difference([-0.1, -0.101, -0.099])) == "better"
    assert verdict_text.judge(difference([0.1, 0.101, 0.099])) == "worse"


def test_equivalence_needs_the_margin() -> None:
    values = [0.0005, -0.0004, 0.0001, 0.0002]
    assert verdict_text.judge(difference(values, margin=0.01)) == "same"
    assert verdict_text.judge(difference(values, margin=0.0002)) == "undecided"


def test_one_seed_is_not_judged() -> None:
    d = difference([-0.5])
    assert verdict_text.judge(d) == "unjudged"
    sentence = verdict_text.verdict({"b": {"a": d}}, baseline="b", protocol="params", margin=0.01)
    assert "cannot be judged" in sentence and "better" not in sentence


def test_seeds_that_agree_by_luck_are_not_relied_on() -> None:
    noisy = {f"a{k}": np.array([0.015, -0.02, 0.01]) * (1 - 2 * (k % 2)) for k in range(3)}
    d = compared({**noisy, "lucky": [-0.0206, -0.0204, -0.0199]}, margin=0.01)
    assert d["lucky"].p_holm < 0.05 < d["lucky"].p_pooled_holm
    assert verdict_text.judge(d["lucky"]) == "undecided" and "add seeds" in verdict_text.says(
        d["lucky"], 0.01
    )
    sentence = verdict_text.verdict({"b": d}, baseline="b", protocol="params", margin=0.01)
    assert "the seeds of lucky agree on −0.0203" in sentence and "better" not in sentence


def test_sameness_by_luck_is_not_relied_on_either() -> None:
    noisy = {f"a{k}": np.array([0.015, -0.02, 0.01]) * (1 - 2 * (k % 2)) for k in range(3)}
    d = compared({**noisy, "lucky": [0.0001, 0.0, -0.0001]}, margin=0.01)["lucky"]
    assert d.p_equivalent_holm < 0.05 < d.p_equivalent_pooled_holm
    assert verdict_text.judge(d) == "undecided" and "no difference detected" in verdict_text.says(d, 0.01)


def test_the_line_and_the_judgement_of_an_arm_agree() -> None:
    """Tiny but steady: significant by its own noise alone, and within the margin by both."""
    noisy = {f"a{k}": np.array([0.0015, -0.002, 0.001]) * (1 - 2 * (k % 2)) for k in range(3)}
    d = compared({**noisy, "tiny": [-0.00206, -0.00204, -0.00199]}, margin=0.02)["tiny"]
    assert verdict_text.lucky(d) and verdict_text.judge(d) == "same"
    assert verdict_text.says(d, 0.02) == "no different within ±0.0200 bits per byte"


def test_holm_can_take_back_what_one_interval_shows() -> None:
    d = dataclasses.replace(difference([-0.01, -0.012, -0.013]), p=0.03, p_holm=0.12, p_equivalent_holm=0.5)
    assert verdict_text.judge(d) == "undecided"
    assert "not after Holm" in verdict_text.says(d, 0.01)


def test_a_difference_that_the_choice_of_documents_could_explain_says_so() -> None:
    d = difference([-0.02, -0.021, -0.019], error=0.05)
    assert "choice alone could explain" in verdict_text.says(d, 0.01)
    assert "choice alone" not in verdict_text.says(difference([-0.02, -0.021, -0.019], error=0.0001), 0.01)


def test_verdict_names_every_arm_once() -> None:
    rng = np.random.default_rng(0)
    d = compared(
        {
            "good": -0.1 + rng.normal(0, 0.001, 5),
            "bad": 0.1 + rng.normal(0, 0.001, 5),
            "close": rng.normal(0, 0.0005, 5),
            "open": [0.012, 0.001, 0.009, 0.002, 0.006],
        },
        margin=0.01,
    )
    text = verdict_text.verdict(
        {"plain": d, "good": {"bad": d["bad"]}}, baseline="plain", protocol="params", margin=0.01, failed=1
    )
    assert text.startswith("At equal parameters and tokens: good is better than plain by 0.1")
    assert "bad is worse than plain" in text
    assert "close is no different from plain within ±0.0100" in text
    assert "between open and plain no difference was detected" in text
    assert text.endswith("1 run failed and is left out.")
    assert "\nContrasts at equal parameters and tokens: bad is worse than good by 0.1" in text
    assert all(text.count(name + " ") == 1 + (name == "bad") for name in d if name != "good")


def test_many_arms_of_one_kind_are_counted() -> None:
    d = compared({f"a{k}": [0.01 * (k + 1), -0.01, 0.002] for k in range(8)}, margin=0.001)
    text = verdict_text.verdict({"b": d}, baseline="b", protocol="params", margin=0.001)
    assert "between a0, a1, a2 or 5 others and b; this study could have seen" in text
    assert verdict_text.some(list("abcdef")) == "a, b, c, d, e and f"


def test_many_claims_are_one_list_and_contrasts_are_grouped() -> None:
    rng = np.random.default_rng(1)
    d = compared({f"a{k}": 0.1 * (k + 1) + rng.normal(0, 0.001, 5) for k in range(5)}, margin=0.01)
    text = verdict_text.verdict({"b": d}, baseline="b", protocol="params", margin=0.01)
    assert text.count("worse than b") == 1 and text.count("bits per byte") == 1
    assert text.endswith(", ".join(f"{name} by {verdict_text.amount(x.mean)}" for name, x in d.items()) + ".")
    noisy = {f"a{k}": np.array([0.015, -0.02, 0.01]) * (1 - 2 * (k % 2)) for k in range(3)}
    lucky = compared({**noisy, "lucky": [-0.0206, -0.0204, -0.0199]}, margin=0.01)
    told = verdict_text.verdict(
        {"b": {}, "c": {"lucky": lucky["lucky"]}, "e": {"lucky": lucky["lucky"], "a0": lucky["a0"]}},
        baseline="b",
        protocol="params",
        margin=0.01,
    )
    assert (
        "no difference detected between lucky and c, lucky and e, a0 and e; this study could have seen"
        in told
    )
    assert (
        "the seeds of lucky (against c) agree on −0.0203, those of lucky (against e) on −0.0203, but more"
        in told
    )


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (-0.5, "0.5000"), (0.00012, "0.00012"), (0.0, "0.0000")]
)
def test_amounts(value: float, text: str) -> None:
    assert verdict_text.amount(value) == text


def test_missing_numbers_never_reach_a_sentence() -> None:
    d = difference([0.1])
    assert math.isnan(d.low)
    assert "nan" not in verdict_text.says(d, 0.01) + verdict_text.verdict(
        {"b": {"a": d}}, baseline="b", protocol="time", margin=0.01
    )


def in_rounds(values: Any, comparisons: int = 1, margin: float = 0.01) -> statistics.Difference:
    until = Until(seeds=30)
    standing = stopping.standings({"a": values}, until, comparisons=comparisons, margin=margin)["a"]
    return stopping.restated(statistics.compare({"a": values}, margin=margin)["a"], standing, until, margin)


def test_a_study_that_adds_seeds_says_how_well_it_knows() -> None:
    noise = np.random.default_rng(3).normal(0, 0.004, 12)
    assert verdict_text.judge(in_rounds(noise - 0.03)) == "better"
    assert verdict_text.judge(in_rounds(noise)) == "same"
    open_ = in_rounds(noise + 0.004, margin=0.002)
    assert verdict_text.judge(open_) == "undecided"
    assert (
        verdict_text.says(open_, 0.002)
        == f"no difference detected; known to ±{open_.detectable:.4f} bits per byte"
    )
    text = verdict_text.verdict({"b": {"a": open_}}, baseline="b", protocol="params", margin=0.002)
    assert text.endswith(
        f"no difference detected between a and b; known to ±{open_.detectable:.4f} bits per byte."
    )


def test_too_few_seeds_say_nothing_whatever_they_show() -> None:
    d = in_rounds([0.5, 0.5001, 0.4999])
    assert verdict_text.judge(d) == "undecided"
    assert verdict_text.says(d, 0.01) == "nothing can be said after 3 seeds"


def test_holm_counts_what_was_planned_when_seeds_are_added_too() -> None:
    values = np.random.default_rng(4).normal(0.005, 0.004, 12)
    alone, among = in_rounds(values), in_rounds(values, comparisons=9)
    assert alone.p_holm < 0.05 < among.p_holm
    assert verdict_text.judge(alone) == "worse" and verdict_text.judge(among) == "undecided"


def test_a_control_is_told_in_margins() -> None:
    text = verdict_text.control("half", "plain", 0.123, 0.001, seen=True, margin=0.01)
    assert (
        text
        == "The positive control half is worse than plain by 0.1230 bits per byte (12.3 margins), as it must be."
    )
    text = verdict_text.control("half", "plain", 0.01, 0.2, seen=False, margin=0.01)
    assert text.startswith("This study cannot see anything") and "one-sided p 0.2" in text
