"""Studies that add seeds until they know, for real: grown from a finished one, killed, with a control and failures."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from entasis.study import analysis, plan, rounds, runner, study_files
from entasis.study.arms import Findings
from entasis.study.executors import launchers
from entasis.study.verdict import FirstPlan, Verdict, plain

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("study")]

ARMS = {"plain": {}, "slope": {"shape.profile": "vanilla"}, "half": {"control": True}}
UNTIL = {"detectable": 0.04, "seeds": 7}


def source(**changes: Any) -> dict[str, Any]:
    return {
        "base": {
            "shape": {"profile": "isotropic", "budget": "20k", "layers": 2, "d_model": 16, "head_dim": 8,
                      "vocabulary": 512, "tied_embeddings": True, "context": 32},
            "data": {"train": "corpora/code/train", "validation": "corpora/code/validation", "sequence": 32},
            "tokens": 2048,
            "batch": {"tokens": 256},
            "optimizer": {"lr": 5e-3},
            "logging": {"tensorboard": False},
            "checkpoint": {"every": None},
            "evaluation": {"tokens": 4000},
            "precision": "fp32", "attention": "sdpa", "compile": False,
        },
        "corpora": {"code": {"sources": [str(Path(json.__file__).parent)], "train_tokenizer": 512, "validation": 0.3}},
        "arms": ARMS,
        "seeds": 2,
        "threads": 1,
    } | changes  # fmt: skip


def run(folder: Path, **changes: Any) -> tuple[Verdict, str]:
    out = io.StringIO()
    study = study_files.from_dict(source(**changes), name="s")
    return runner.run(study, folder, Console(file=out, width=160)), out.getvalue()


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of two fixed seeds."""
    folder = tmp_path_factory.mktemp("fixed") / "s"
    verdict, _ = run(folder)
    assert verdict.complete and verdict.until is None and verdict.finished == 6
    return folder


@pytest.fixture(scope="module")
def grown(fixed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Verdict]:
    """The same, grown until it knows."""
    folder = tmp_path_factory.mktemp("grown") / "s"
    shutil.copytree(fixed, folder)
    return folder, run(folder, until=UNTIL)[0]


def known(verdict: Verdict) -> dict[str, Any]:
    """What a verdict says, without what was timed."""
    timed = ("tokens_per_second", "seconds", "peak_memory_bytes")
    told: dict[str, Any] = json.loads(json.dumps(plain(verdict)))
    for part in told["protocols"].values():
        for arm in part["arms"].values():
            for key in timed:
                arm.pop(key)
    return told


def test_growing_adds_what_is_missing_and_judges_by_the_valid_sequence(
    fixed: Path, grown: tuple[Path, Verdict]
) -> None:
    folder, verdict = grown
    arms = verdict.protocols["params"].arms
    for path in fixed.glob("runs/*/*/result.json"):
        there = folder / path.relative_to(fixed)
        assert there.stat().st_mtime_ns == path.stat().st_mtime_ns
    slope = arms["slope"].difference
    assert verdict.complete and slope.method == "anytime" and math.isnan(slope.p_pooled)
    assert 5 <= slope.n <= 7 and len(arms["slope"].looks) == slope.n
    # Answered, or out of seeds: the half width of the simultaneous sequence is that of the last look.
    last = arms["slope"].looks[-1]
    assert slope.detectable == pytest.approx((last.together_high - last.together_low) / 2)
    assert slope.detectable <= 0.04 or slope.n == 7 or slope.p_holm < 0.05
    assert verdict.planned_first == FirstPlan(seeds=[0, 1], arms=list(ARMS), until=None)
    assert "planned with 2 seeds, of which no p is claimed" in verdict.sentence
    assert (folder / "study.first.yaml").read_text() == (fixed / "study.yaml").read_text()
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "What was planned first" in page and "holds at all looks at once" in page
    assert (folder / "tables/looks-params.csv").read_text().count("\n") == slope.n + 1
    # The control is no part of the family, and is judged by itself.
    assert verdict.comparisons == 1 and arms["half"].judgement in ("seen", "unseen")
    assert verdict.controls["half"].margins == pytest.approx(arms["half"].difference.mean / 0.01)


def test_a_killed_study_ends_with_the_same_verdict(
    fixed: Path, grown: tuple[Path, Verdict], tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    shutil.copytree(fixed, folder)
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(source(until=UNTIL)))
    command = [sys.executable, "-m", "entasis", "study", "run", str(file), "--output", str(folder)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while len(list(folder.glob("runs/*/*/result.json"))) < 8 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert known(run(folder, until=UNTIL)[0]) == known(grown[1])


def test_a_seed_that_fails_again_ends_its_comparison_and_is_told(
    grown: tuple[Path, Verdict], tmp_path: Path
) -> None:
    """A new arm on a grown study: its runs are added and nothing else; they fail, and no pair is dropped in silence."""
    folder = tmp_path / "s"
    shutil.copytree(grown[0], folder)
    before = {p.relative_to(folder) for p in folder.glob("runs/*/*/result.json")}
    arms = {**ARMS, "wild": {"optimizer.lr": 1000, "optimizer.weight_decay": 1000}}
    verdict, out = run(folder, arms=arms, until=UNTIL)
    assert {p.relative_to(folder) for p in folder.glob("runs/*/*/result.json")} >= before
    assert not list(folder.glob("runs/wild/*/result.json")) and not verdict.complete
    assert "The comparison of wild ends after 0 seeds, as runs/wild/seed-0 failed." in verdict.sentence
    assert "Added after the first runs: wild." in verdict.sentence and "new: wild" in out
    assert verdict.comparisons == 2
    assert out.count("failed  runs/wild/seed-0") == 2  # tried once more, and then no more


def test_a_control_that_is_not_seen_is_said_first(fixed: Path, tmp_path: Path) -> None:
    """The baseline trained twice as long as the study says cannot be told from it by one seed."""
    folder = tmp_path / "s"
    shutil.copytree(fixed / "corpora", folder / "corpora")
    shutil.move(folder, tmp_path / "c")
    data = {
        "train": str(tmp_path / "c/corpora/code/train"),
        "validation": str(tmp_path / "c/corpora/code/validation"),
        "sequence": 32,
    }
    base = source()["base"] | {"data": data}
    arms = {"plain": {}, "faint": {"control": True, "optimizer.weight_decay": 0.11}}
    verdict, _ = run(folder, base=base, corpora={}, arms=arms)
    assert verdict.sentence.startswith(
        "This study cannot see anything: not even that its positive control faint is worse than plain"
    )
    assert verdict.protocols["params"].arms["faint"].judgement == "unseen"


def test_a_control_is_asked_for_under_every_protocol_that_trains_it_differently(tmp_path: Path) -> None:
    """With this speed a run of the baseline is twice as long under time, and so is its control's."""
    until = {"protocols": ["params", "time"], "hours": 0.01, "until": {"seeds": 2}}
    study = study_files.from_dict(source(**until), name="s")
    speeds = dict.fromkeys(ARMS, 4096 / 36)
    laid = plan.lay_out(study, plan.solve(study, 512), Findings(tokens_per_second=speeds))
    asked = {run.folder: run for run in rounds.wanted(study, laid, tmp_path).runs}
    assert asked["runs/half/seed-0"].tokens == 1024 and asked["runs/half@time/seed-0"].tokens == 2048
    measured = {name: [[speed, speed]] for name, speed in speeds.items()}
    (tmp_path / "throughput.json").write_text(json.dumps({"tokens_per_second": measured}))
    note = launchers.failure_note(tmp_path, asked["runs/half@time/seed-0"])
    note.parent.mkdir(parents=True)
    note.write_text("out of luck")
    told = analysis.judge(study, laid, tmp_path).sentence
    assert "The comparison of half ends after 0 seeds, as runs/half@time/seed-0 failed." in told
