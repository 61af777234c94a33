"""Studies on submitit's local executor and on a Ray of this machine, with workers killed in the middle."""

import io
import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from entasis.errors import Failure, UserError
from entasis.study import config, machine, runner, study_files
from entasis.study.arms import Findings
from entasis.study.executors import launchers, slurm
from entasis.study.executors.launchers import State, failure_note
from entasis.study.plan import lay_out, solve

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.xdist_group("launchers")]

OPTIONS = {"slurm": {"cluster": "local"}, "ray": {"cpus": "1"}}
WORKER = {"slurm": "submitit", "ray": "ray::runs/plain"}


def study_of(text: Path, **changes: Any) -> config.Study:
    source = {
        "base": {
            "shape": {"profile": "isotropic", "budget": "40k", "layers": 4, "d_model": 32, "head_dim": 8,
                      "vocabulary": 512, "tied_embeddings": True, "context": 32},
            "data": {"train": "corpora/code/train", "validation": "corpora/code/validation", "sequence": 32},
            "tokens": 256 * 300,
            "batch": {"tokens": 256},
            "optimizer": {"lr": 5e-3},
            "checkpoint": {"every": 20, "keep_last": 1},
            "logging": {"tensorboard": False},
            "precision": "fp32",
        },
        "corpora": {"code": {"sources": [str(text)], "train_tokenizer": 512, "validation": 0.3}},
        "arms": {"plain": {}, "wild": {"optimizer.lr": 1000, "optimizer.weight_decay": 1000}},
        "seeds": 1,
        "threads": 1,
    }  # fmt: skip
    return study_files.from_dict(source | changes, name="s")


@pytest.fixture(scope="module", autouse=True)
def one_core() -> None:
    """Not here: Ray's own processes would all have to share it."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name in ("argparse", "ast", "difflib", "inspect", "tarfile", "typing"):
        shutil.copy(Path(os.__file__).with_name(f"{name}.py"), folder)
    return folder


@pytest.mark.parametrize("name", ["slurm", "ray"])
def test_a_killed_worker_is_replaced_and_a_wrong_run_is_not(name: str, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit" if name == "slurm" else "ray", reason=f"the extra {name} is not installed")
    study = study_of(text)
    with launchers.find("local")(tmp_path / "logs", 1, {}) as here:
        machine.settle(study, tmp_path, solve(study), here)
    study = machine.applied(study, tmp_path)
    runner._prepare(study, tmp_path, Console(file=io.StringIO()))
    runs = lay_out(study, solve(study), Findings()).runs
    killed: list[int] = []

    def kill_once(states: Sequence[State]) -> None:
        if killed or states[0].status != "running" or not 4 < states[0].step < 280:
            return
        # Ray's workers are no children of this process; what was killed is a zombie for a while.
        found = [p for p in psutil.process_iter(["cmdline", "status", "create_time"]) if p.info["cmdline"]]
        mine = [p for p in found if WORKER[name] in " ".join(p.info["cmdline"])]
        if mine:  # the youngest is the process that trains, not the one that watches it
            killed.append(max(mine, key=lambda p: p.info["create_time"]).pid)
            os.kill(killed[0], signal.SIGKILL)

    with launchers.find(name)(tmp_path / "logs", 1, OPTIONS[name]) as pool:
        states = launchers.execute(tmp_path, runs, pool, kill_once)
    assert killed, "the run was over before its worker could be killed"
    status = {s.run.arm: (s.status, s.message) for s in states}
    assert status["plain"] == ("done", "")
    assert status["wild"][0] == "failed" and "finite" in status["wild"][1]
    assert "finite" in failure_note(tmp_path, next(r for r in runs if r.arm == "wild")).read_text()
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "runs/plain/seed-0/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 301))  # gone on, no step lost or twice


def test_the_same_results_in_the_study_folder_as_on_this_machine(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    arms = {"plain": {}, "slope": {"shape.profile": "vanilla"}}
    console = Console(file=io.StringIO(), width=160)
    base = {"base": {**study_of(text).base, "tokens": 2048}, "arms": arms}
    here = runner.run(study_of(text, **base), tmp_path / "here", console)
    there = runner.run(
        study_of(text, **base), tmp_path / "there", console, launcher="slurm", options=OPTIONS["slurm"]
    )
    for arm in arms:
        a, b = (v.protocols["params"].arms[arm].scores for v in (here, there))
        assert a == b
    assert (tmp_path / "there" / "report.html").is_file()


def test_unknown_launchers_and_options() -> None:
    with pytest.raises(UserError, match="choose one of local, "):
        launchers.find("kubernetes")
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    options = {"cluster": "local", "nodez": "1"}
    with pytest.raises(UserError, match="nodez"), launchers.find("slurm")(Path("logs"), 1, options):
        pass


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("local", "runs_per_gpu", "0"),
        ("slurm", "at_once", "0"),
        ("slurm", "at_once", "all"),
        ("slurm", "timeout_min", "long"),
        ("ray", "gpus", "two"),
        ("ray", "gpus", "1.5"),
        ("ray", "cpus", "nan"),
    ],
)
def test_wrong_values_of_options_are_a_line(name: str, option: str, value: str, tmp_path: Path) -> None:
    if name != "local":
        pytest.importorskip(
            "submitit" if name == "slurm" else "ray", reason=f"the extra {name} is not installed"
        )
    options = {option: value} | ({"cluster": "local"} if name == "slurm" else {})
    with (
        pytest.raises(UserError, match=f"{option}.*{value}"),
        launchers.find(name)(tmp_path / "logs", 1, options),
    ):
        pass


def test_runs_that_share_a_gpu_are_refused_under_time(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    study, console = study_of(text, protocols=["time"]), Console(file=io.StringIO())
    with pytest.raises(UserError, match="alone on their GPU; with these options several share one"):
        runner.run(study, tmp_path / "s", console, launcher="ray", options={"gpus": "0.25"})
    assert not (tmp_path / "s" / "corpora").exists()


def test_a_job_that_the_scheduler_does_not_take_is_a_line() -> None:
    submitit = pytest.importorskip("submitit", reason="the extra slurm is not installed")

    class Refusing:
        def update_parameters(self, **parameters: Any) -> None: ...

        def submit(self, *arguments: Any) -> None:
            raise submitit.core.utils.FailedJobError("sbatch: error: invalid partition\nspecified: gpuu")

    with pytest.raises(Failure, match=r"runs/a/seed-0 was not taken: .* invalid partition specified: gpuu"):
        slurm._Slurm(Refusing(), None).submit("runs/a/seed-0", print)
