"""Simulated scaling studies with a known truth."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from entasis import cli
from entasis.errors import UserError
from entasis.study import scaling, verdict
from entasis.study.verdict import TrunkCost

FLOOR, EXPONENT, TRUTH = 0.6, 0.12, {"base": 1.0, "better": 1.25, "same": 1.0, "worse": 0.8}
BUDGETS = np.array([1e13, 4e13, 1.6e14, 6.4e14])
DEARER = 1.04


def simulate(
    rng: np.random.Generator, seeds: int, noise: float
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Arms that cost 4 % more than the baseline, a seed effect that all share, and noise of each run's own."""
    flops, scores = {}, {}
    shared = rng.normal(0, 2 * noise, (len(BUDGETS), seeds))
    for arm, m in TRUTH.items():
        compute = BUDGETS * (1 if arm == "base" else DEARER)
        level = FLOOR + 40 * (m * compute) ** -EXPONENT
        flops[arm] = np.repeat(compute[:, None], seeds, 1)
        scores[arm] = level[:, None] * np.exp(shared + rng.normal(0, noise, (len(BUDGETS), seeds)))
    return flops, scores


def test_without_noise_the_truth_comes_back() -> None:
    found, answer = scaling.multipliers(*simulate(np.random.default_rng(0), 3, 0.0), "base")
    assert found.floor == pytest.approx(FLOOR, rel=1e-3)
    assert found.exponent == pytest.approx(EXPONENT, rel=1e-3)
    for arm, (m, low, high) in answer.items():
        assert m == pytest.approx(TRUTH[arm], rel=1e-3)
        assert low == pytest.approx(high, rel=1e-3)


@pytest.mark.slow
def test_intervals_hold_the_true_multiplier() -> None:
    rng, held = np.random.default_rng(1), []
    for _ in range(40):
        _, answer = scaling.multipliers(*simulate(rng, 4, 0.002), "base")
        held += [low <= TRUTH[arm] <= high for arm, (_, low, high) in answer.items()]
    # 120 intervals of 95 %: fewer than 104 held would be four standard deviations off.
    assert sum(held) >= 104, sum(held)


def test_one_seed_has_no_interval() -> None:
    _, answer = scaling.multipliers(*simulate(np.random.default_rng(2), 1, 0.001), "base")
    assert all(math.isnan(low) and math.isnan(high) for _, low, high in answer.values())


def write(
    folder: Path,
    i: int,
    flops: dict[str, np.ndarray],
    scores: dict[str, np.ndarray],
    text: str,
    documents: int = 5,
    trunk: float = 0.0,
) -> Path:
    """A study's verdict, in which runs of `better` have this part of their FLOPs from a trunk."""
    like = verdict.read(Path(__file__).parents[2] / "results/quickstart")
    part = like.protocols["params"]
    arms = {
        arm: replace(
            part.arms[like.baseline],
            scores={s: float(scores[arm][i, s]) for s in range(scores[arm].shape[1])},
            training_flops=int(flops[arm][i, 0] * (1 - trunk * (arm == "better"))),
            trunk=TrunkCost(name="small", tokens=1, flops=int(flops[arm][i, 0] * trunk))
            if trunk and arm == "better"
            else None,
        )
        for arm in scores
    }
    (folder / "runs/base/seed-0").mkdir(parents=True)
    written = replace(like, baseline="base", protocols={"params": replace(part, arms=arms)})
    verdict.write(folder, written)
    data = {
        "data": {"tokenizer": "t", "validation": text},
        "validation": {"documents": documents, "bytes": 9},
    }
    (folder / "runs/base/seed-0/result.json").write_text(json.dumps(data))
    return folder


def test_studies_are_read_and_mixtures_refused(tmp_path: Path) -> None:
    flops, scores = simulate(np.random.default_rng(3), 3, 1e-4)
    folders = [write(tmp_path / str(i), i, flops, scores, "v") for i in range(4)]
    plain, table, notes = scaling.scale(folders)
    rows = {row["arm"]: row for row in plain["arms"]}
    assert rows["better"]["low"] < 1.25 < rows["better"]["high"] and rows["better"]["low"] > 1
    assert "better needs less compute than base" in notes[1] and "1.2" in table.csv()
    with pytest.raises(UserError, match="at least 3 studies"):
        scaling.scale(folders[:2])
    with pytest.raises(UserError, match="fewer than 3 different values"):
        scaling.scale([folders[0], folders[0], folders[1]])
    other = write(tmp_path / "other", 0, flops, scores, "another text")
    fewer = write(tmp_path / "fewer", 0, flops, scores, "v", documents=4)
    for study in (other, fewer):
        with pytest.raises(UserError, match="differ in tokenizer or held-out documents"):
            scaling.scale([*folders[1:], study])
    grown = [write(tmp_path / f"grown-{i}", i, flops, scores, "v", trunk=0.5) for i in range(4)]
    for a, b in zip(scaling.scale(grown)[0]["arms"], plain["arms"], strict=True):
        assert a["multiplier"] == pytest.approx(b["multiplier"], rel=1e-6)


def test_what_is_left_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flops, scores = simulate(np.random.default_rng(4), 3, 1e-4)
    folders = [str(write(tmp_path / str(i), i, flops, scores, "v")) for i in range(3)]
    assert cli.main(["study", "scale", *folders]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "under params for 4 arms, 3 budgets, 3 seeds" in told and "eft out" not in told
    whole = verdict.read(tmp_path / "1")
    part = whole.protocols["params"]
    arms = {name: arm for name, arm in part.arms.items() if name != "worse"}
    arms["same"] = replace(arms["same"], scores={s: x for s, x in arms["same"].scores.items() if s != 2})
    lacking = replace(part, arms=arms)
    failed = {"runs/same/seed-2": "out of luck"}
    protocols = {"params": lacking, "flops": part}
    verdict.write(
        tmp_path / "1", replace(whole, protocols=protocols, failed=failed, complete=False, runs=9, finished=8)
    )
    assert cli.main(["study", "scale", *folders]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "under params for 3 arms, 3 budgets, 2 seeds" in told
    assert f"Not fitted: flops; the fit is of params, the first protocol of {folders[0]}." in told
    assert f"Left out: arm worse, which is not in {folders[1]}." in told
    assert f"Left out: seed 2, not finished by same in {folders[1]}." in told
    assert f"{folders[1]}: 8 of 9 runs are finished, 1 failed." in told
