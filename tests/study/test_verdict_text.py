"""The sentences claim what the numbers support, and no more."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from entasis.study import statistics, verdict_text


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
    sentence = verdict_text.verdict({"a": d}, baseline="b", protocol="params", margin=0.01)
    assert "cannot be judged" in sentence and "better" not in sentence


def test_seeds_that_agree_by_luck_are_not_relied_on() -> None:
    noisy = {f"a{k}": np.array([0.015, -0.02, 0.01]) * (1 - 2 * (k % 2)) for k in range(3)}
    d = compared({**noisy, "lucky": [-0.0206, -0.0204, -0.0199]}, margin=0.01)
    assert d["lucky"].p_holm < 0.05 < d["lucky"].p_pooled_holm
    assert verdict_text.judge(d["lucky"]) == "undecided" and "add seeds" in verdict_text.says(
        d["lucky"], 0.01
    )
    sentence = verdict_text.verdict(d, baseline="b", protocol="params", margin=0.01)
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
    text = verdict_text.verdict(d, baseline="plain", protocol="params", margin=0.01, failed=1)
    assert text.startswith("At equal parameters and tokens: good is better than plain by 0.1")
    assert "bad is worse than plain" in text
    assert "close is no different from plain within ±0.0100" in text
    assert "between open and plain no difference was detected" in text
    assert text.endswith("1 run failed and is left out.")
    assert all(text.count(name + " ") == 1 for name in d)


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (-0.5, "0.5000"), (0.00012, "0.00012"), (0.0, "0.0000")]
)
def test_amounts(value: float, text: str) -> None:
    assert verdict_text.amount(value) == text


def test_missing_numbers_never_reach_a_sentence() -> None:
    d = difference([0.1])
    assert math.isnan(d.low)
    assert "nan" not in verdict_text.says(d, 0.01) + verdict_text.verdict(
        {"a": d}, baseline="b", protocol="time", margin=0.01
    )
