"""Equal time: the error of measured speeds, what it is worth in bits per byte, and verdicts that it forbids."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from entasis.study import statistics, throughput, verdict_text
from entasis.study.plan import PlannedRun
from entasis.study.results import Outcome


def test_the_error_of_a_ratio_of_speeds_covers_its_truth() -> None:
    """Both share the machine's ups and downs, which a ratio within a round is free of."""
    rng = np.random.default_rng(0)
    covered, width = [], []
    for _ in range(400):
        machine = rng.normal(0, 0.3, 18)
        arm, base = (np.exp(m + machine + rng.normal(0, 0.02, 18)) for m in (math.log(900), math.log(1000)))
        half = throughput.relative_error(arm, base)
        covered.append(abs(np.log(arm / base).mean() - math.log(0.9)) <= half)
        width.append(half)
    assert 0.92 < np.mean(covered) < 0.98 and np.mean(width) < 0.02
    assert math.isnan(throughput.relative_error(np.array([900.0]), np.array([1000.0])))


def test_the_slope_is_that_of_the_loss_over_tokens_before_the_decay(tmp_path: Path) -> None:
    rows = [{"tokens": 100 * i, "loss": 5 - 0.3 * math.log(100 * i)} for i in range(1, 81)]
    # What falls as the learning rate decays is no gain from more tokens.
    rows += [{"tokens": 100 * i, "loss": 1.0} for i in range(81, 101)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = PlannedRun(kind="main", arm="a", seed=0, folder="a", tokens=10_000, flops=1,
                     recipe={"schedule": {"decay": "20%"}})  # fmt: skip
    result = {"steps": 100, "validation": {"tokens": 1000, "bytes": 4000}}
    expected = 0.3 * 1000 / (4000 * math.log(2))
    assert throughput.slope([Outcome(run, tmp_path, result)]) == pytest.approx(expected)
    assert math.isnan(throughput.slope([]))


def test_no_verdict_by_time_that_the_speed_s_error_could_undo() -> None:
    compared = statistics.compare(
        {"fast": [-0.02, -0.021, -0.019], "even": [0.0001, -0.0001, 0.0002]}, margin=0.01
    )
    found = statistics.adjust(compared, 2)
    fast, even = found["fast"], found["even"]
    assert (verdict_text.judge(fast), verdict_text.judge(even)) == ("better", "same")

    def known_to(error: float) -> list[str]:
        return [
            verdict_text.judge(dataclasses.replace(d, length_error=error, margin=0.01)) for d in (fast, even)
        ]

    assert known_to(0.001) == ["better", "same"]
    assert known_to(0.015) == ["better", "undecided"]
    assert known_to(0.03) == known_to(math.nan) == ["undecided", "undecided"]
    uncertain = {"fast": dataclasses.replace(fast, length_error=0.03, margin=0.01)}
    assert verdict_text.says(uncertain["fast"], 0.01) == (
        "not established: the error of its measured speed alone is worth 0.0300 bits per byte"
    )
    sentence = verdict_text.verdict({"plain": uncertain}, baseline="plain", protocol="time", margin=0.01)
    assert "fast differs by −0.0200, but the error of its measured speed alone is worth 0.0300" in sentence
