"""What a study settles once for all its runs: one precision for all arms, attention by shape, kept on resume."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from entasis import cli
from entasis.errors import UserError
from entasis.study import config, machine, plan, study_files
from entasis.study.arms import Findings
from entasis.study.executors import launchers, local
from entasis.train.candidates import Measured, Settings

SHAPE = {"profile": "isotropic", "budget": "40k", "layers": 4, "d_model": 32, "head_dim": 8,
         "vocabulary": 512, "tied_embeddings": True, "context": 32}  # fmt: skip


def study(**changes: Any) -> config.Study:
    source: dict[str, Any] = {
        "base": {"shape": SHAPE, "data": {"train": "corpora/a/train", "validation": "corpora/a/validation", "sequence": 32},
                 "tokens": "64k", "batch": {"tokens": 64}, "device": "cpu", "compile": False},
        "arms": {"plain": {}, "slope": {"shape.profile": "vanilla"}, "faster": {"optimizer.lr": 1e-3}},
        "seeds": 2,
        "threads": 1,
    }  # fmt: skip
    return study_files.from_dict(source | changes, name="s")


def timed(precision: Any, attention: Any, seconds: float) -> dict[str, Any]:
    settings = Settings(precision, attention, False)
    return Measured(settings=settings, fastest=seconds, median=seconds, compilation=0.0, rounds=3).plain()


def answer(*jobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "device": "cpu",
        "jobs": [
            {
                "timings": rows,
                "simplest": ["fp32", "sdpa", False],
                "precision_open": True,
                "steps": 100,
                "runs": 2,
            }
            for rows in jobs
        ],
    }


def test_precision_is_one_for_all_arms_and_attention_is_of_each_shape() -> None:
    wide = [
        timed("fp32", "sdpa", 2.0),
        timed("fp32", "plain", 1.0),
        timed("bf16", "sdpa", 0.5),
        timed("bf16", "plain", 0.9),
    ]
    small = [
        timed("fp32", "sdpa", 0.1),
        timed("fp32", "plain", 0.2),
        timed("bf16", "sdpa", 0.3),
        timed("bf16", "plain", 0.2),
    ]
    arms = machine.decide([("wide",), ("small", "twin")], [answer(wide, small)])["arms"]
    # Alone, the small one would train in fp32.
    assert arms["wide"] == {"precision": "bf16", "attention": "sdpa", "compile": False}
    assert arms["small"] == arms["twin"] == {"precision": "bf16", "attention": "plain", "compile": False}


def test_settings_are_timed_once_and_kept(tmp_path: Path) -> None:
    s = study()
    arms = plan.solve(s)
    assert machine.jobs_of(arms) == [("plain", "faster"), ("slope",)]
    with launchers.find("local")(tmp_path / "logs", 1, {}) as pool:
        told = machine.settle(s, tmp_path, arms, pool)
    assert "plain, faster: " in told and "one step takes" in told
    kept = json.loads((tmp_path / machine.FILE).read_text())
    assert all(len(kept["timings"][name]) >= 2 for name in arms)
    settled = plan.solve(machine.applied(s, tmp_path))
    runs = plan.lay_out(machine.applied(s, tmp_path), settled, Findings()).runs
    for run in runs:
        assert {k: run.recipe[k] for k in machine.KEYS} == kept["arms"][run.arm]
    assert len({run.recipe["precision"] for run in runs}) == 1
    # What the file says holds, whatever would be measured now.
    kept["arms"] = {
        name: {**arm, "precision": "bf16", "attention": "plain"} for name, arm in kept["arms"].items()
    }
    (tmp_path / machine.FILE).write_text(json.dumps(kept))
    again = plan.solve(machine.applied(s, tmp_path))
    assert {(a.recipe["precision"], a.recipe["attention"]) for a in again.values()} == {("bf16", "plain")}


def test_what_the_study_says_itself_stays(tmp_path: Path) -> None:
    s = study(arms={"plain": {}, "half": {"precision": "bf16"}}, base={**study().base, "attention": "plain"})
    (tmp_path / machine.FILE).write_text(
        json.dumps({"device": "cpu", "arms": {n: Settings("fp32", "sdpa", False)._asdict() for n in s.arms}})
    )
    arms = plan.solve(machine.applied(s, tmp_path))
    assert {n: a.recipe["precision"] for n, a in arms.items()} == {"plain": "fp32", "half": "bf16"}
    assert {a.recipe["attention"] for a in arms.values()} == {"plain"}


def test_a_folder_of_an_earlier_version_is_still_read(tmp_path: Path) -> None:
    before = {"device": "cpu", "precision": "bf16", "attention": "sdpa", "compile": False}
    (tmp_path / machine.FILE).write_text(json.dumps(before))
    arms = plan.solve(machine.applied(study(), tmp_path))
    assert {a.recipe["precision"] for a in arms.values()} == {"bf16"}


def test_a_plan_times_every_shape_in_workers_and_imports_no_torch(tmp_path: Path) -> None:
    written = tmp_path / "s.yaml"
    written.write_text(study().to_yaml())
    program = (
        "import sys\nfrom entasis import cli\n"
        "if __name__ == '__main__':\n"
        "    cli.main(sys.argv[1:])\n    assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    (tmp_path / "plan.py").write_text(program)

    def told(*more: str) -> dict[str, Any]:
        command = [sys.executable, "plan.py", "study", "plan", "s.yaml", "--json", *more]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    timed, quick = told(), told("--quick")
    assert "timed on random ids" in timed["speed_source"] and "ceiling" in quick["speed_source"]
    seconds = {row["arm"]: row["seconds"] for row in timed["rows"]}
    # Runs that are the same work take the same time; a run of a thousand steps takes no less than a millisecond each.
    assert seconds["plain"] == seconds["faster"] > 1.0
    assert timed["hours"] * 3600 == pytest.approx(2 * sum(seconds.values()) / timed["at_once"])


def test_a_plan_of_hours_lays_out_runs_that_take_so_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "s.yaml"
    written.write_text(study(protocols=["time"], hours=0.01).to_yaml())
    command = ["study", "plan", str(written), "--output", str(tmp_path / "s"), "--quick", "--json"]
    assert cli.main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["seconds"] for row in told["rows"]] == pytest.approx([36] * 3, rel=0.01)
    assert told["notes"][0].endswith("they follow from the measurement before the runs")


def test_threads_that_the_user_has_set_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "cores", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [place.threads for place in local.places(None)] == [2, 2]
    with pytest.raises(UserError, match="runs_per_gpu=8: torch sees no GPU here"):
        local.places(None, runs_per_gpu=8)
    assert [place.threads for place in local.places(1)] == [1, 1, 1, 1]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [place.threads for place in local.places(None)] == [4]


def test_runs_share_gpus_evenly_and_cores_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "cores", lambda: 16)
    found = local.places_on_gpus(2, runs_per_gpu=3, threads=4)
    assert sorted(place.gpu for place in found) == [0, 0, 0, 1, 1, 1]
    assert [place.threads for place in found] == [2] * 6 and len({place.name for place in found}) == 6
    assert [place.threads for place in local.places_on_gpus(1, runs_per_gpu=32, threads=4)] == [1] * 32
    assert local._Places(found, None).shares_gpus
    assert not local._Places(local.places_on_gpus(2, runs_per_gpu=1, threads=4), None).shares_gpus
    assert not local._Places([local.Place("cpu-0", 1), local.Place("cpu-1", 1)], None).shares_gpus
