"""A whole study for real: tiny models on real text, one run that fails, one worker that is killed."""

import errno
import fcntl
import html
import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from entasis import files
from entasis.errors import UserError
from entasis.files import SEAL
from entasis.study import compare, runner, study_files
from entasis.study.arms import Findings
from entasis.study.executors import launchers, local
from entasis.study.executors.launchers import State, Watcher
from entasis.study.plan import PlannedRun, lay_out, solve
from entasis.study.verdict import Verdict, plain

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
import browser

# One process runs the study that most of these look at.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("study")]

LONG = {"tokens": "60k", "attention": "sdpa", "compile": False, "checkpoint": {"every": 40}}
"""So long that it is not done before the first look."""
MODULES = ("argparse", "ast", "difflib", "inspect", "tarfile", "typing", "zipfile", "shutil")


def source(text: Path, **changes: Any) -> dict[str, Any]:
    return {
        "title": "Does a slope help?",
        "base": {
            "shape": {"profile": "isotropic", "budget": "40k", "layers": 4, "d_model": 32, "head_dim": 8,
                      "vocabulary": 512, "tied_embeddings": True, "context": 32},
            "data": {"train": "corpora/code/train", "validation": "corpora/code/validation", "sequence": 32},
            "tokens": 3072,
            "batch": {"tokens": 256},
            "optimizer": {"lr": 5e-3},
            "checkpoint": {"every": None},
            "logging": {"tensorboard": False},
            "precision": "fp32",
        },
        "corpora": {"code": {"sources": [str(text)], "train_tokenizer": 512, "validation": 0.3}},
        "arms": {"plain": {}, "slope": {"shape.profile": "vanilla"}, "wild": {"optimizer.lr": 1000, "optimizer.weight_decay": 1000}},
        "seeds": 2,
        "threads": 1,
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name in MODULES:
        shutil.copy(Path(os.__file__).with_name(f"{name}.py"), folder)
    return folder


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Verdict, str]:
    """A study run to its end: (folder, verdict, what was printed)."""
    folder = tmp_path_factory.mktemp("study") / "s"
    out = io.StringIO()
    study = study_files.from_dict(source(text), name="s")
    verdict = runner.run(study, folder, Console(file=out, width=160))
    runner.summary(verdict, Console(file=out, width=160))
    return folder, verdict, out.getvalue()


def test_a_failed_arm_stops_no_other_and_is_reported(finished: tuple[Path, Verdict, str]) -> None:
    folder, verdict, out = finished
    assert (verdict.runs, verdict.finished, verdict.complete) == (6, 4, False)
    assert set(verdict.failed) == {"runs/wild/seed-0", "runs/wild/seed-1"}
    assert all("finite" in message for message in verdict.failed.values())
    assert verdict.protocols["params"].arms["wild"].judgement == "missing"
    assert "2 runs failed and are left out" in verdict.sentence and "failed runs/wild/seed-0" in out
    assert "Failed runs" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_numbers_are_those_of_the_runs(finished: tuple[Path, Verdict, str]) -> None:
    folder, verdict, _ = finished
    arms = verdict.protocols["params"].arms
    score = {
        (arm, seed): json.loads((folder / f"runs/{arm}/seed-{seed}/result.json").read_text())["validation"]
        for arm in ("plain", "slope")
        for seed in (0, 1)
    }
    d = [score["slope", s]["bits_per_byte"] - score["plain", s]["bits_per_byte"] for s in (0, 1)]
    assert arms["slope"].difference.mean == pytest.approx(sum(d) / 2)
    assert arms["slope"].difference.evaluation_error > 0
    assert len({s["bytes"] for s in score.values()}) == 1
    assert json.loads((folder / "verdict.json").read_text())["sentence"] == verdict.sentence


def test_same_seed_means_same_data(finished: tuple[Path, Verdict, str]) -> None:
    folder, _, _ = finished

    def first_loss(arm: str, seed: int) -> float:
        with (folder / f"runs/{arm}/seed-{seed}/metrics.jsonl").open() as lines:
            return float(json.loads(next(lines))["loss"])

    # Before the first update the logits are nearly flat; the same batch gives nearly the same loss.
    assert abs(first_loss("plain", 0) - first_loss("slope", 0)) < 0.01


def test_charts_and_tables_are_files_too(finished: tuple[Path, Verdict, str]) -> None:
    folder, _, _ = finished
    for name in ("differences-params", "runs-params", "loss-tokens", "loss-seconds", "silhouettes"):
        assert (folder / "charts" / f"{name}.svg").stat().st_size > 500
        assert (folder / "charts" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert "\\toprule" in (folder / "tables" / "results-params.tex").read_text()
    assert (folder / "tables" / "results-params.csv").read_text().count("\n") == 4


@pytest.mark.parametrize(("width", "theme"), [(1200, "light"), (390, "dark")])
def test_the_report_in_a_browser(
    finished: tuple[Path, Verdict, str], tmp_path: Path, width: int, theme: str
) -> None:
    folder, verdict, _ = finished
    dom = browser.dom(folder / "report.html", tmp_path, width=width, theme=theme)
    text = html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<script.*?</script>", "", dom, flags=re.S)))
    assert all(line in text for line in verdict.sentence.split("\n"))
    # Silhouettes of all arms; forest plot, runs, loss against tokens, loss differences.
    assert len(re.findall(r"<figure>", dom)) == 3
    assert dom.count('data-drawn="yes"') == 4 and 'data-drawn="failed"' not in dom
    assert 'data-overflow="0"' in dom and f'data-width="{width}"' in dom
    for name in ("tokens", "FLOPs", "seconds"):
        assert re.search(rf'role="tab"[^>]*>{name}<', dom)
    assert f"{verdict.protocols['params'].arms['slope'].bits_per_byte:.4f}" in text
    assert "entasis study run study.yaml" in text and "validation fingerprint" in text


def test_a_finished_study_answers_from_what_is_there_even_when_moved(
    finished: tuple[Path, Verdict, str], text: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished[0], moved)
    began = {p: p.stat().st_mtime_ns for p in moved.rglob("result.json")}
    elsewhere = moved / "runs/slope/seed-1/environment.json"
    there = {k: v for k, v in json.loads(elsewhere.read_text()).items() if k != SEAL}
    files.write_json(elsewhere, there | {"device": "another card"}, locked=True)
    verdict = runner.report(moved, Console(file=io.StringIO()))
    page = (moved / "report.html").read_text(encoding="utf-8")
    assert f"<dd>{there['device']} (3 of 4 runs); another card (1 of 4 runs)</dd>" in page
    before = finished[1].protocols["params"].arms["slope"]
    assert plain(verdict.protocols["params"].arms["slope"]) == plain(before)
    assert {p: p.stat().st_mtime_ns for p in moved.rglob("result.json")} == began


def test_another_study_is_kept_out(finished: tuple[Path, Verdict, str], text: Path, tmp_path: Path) -> None:
    other = study_files.from_dict(source(text, margin=0.5), name="s")
    with pytest.raises(UserError, match=r"holds another study: margin is 0\.01 there and 0\.5 here"):
        runner.run(other, finished[0], Console(file=io.StringIO()))
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no study"):
        runner.run(other, tmp_path, Console(file=io.StringIO()))
    with (
        local.only_one(tmp_path),
        pytest.raises(UserError, match="another `entasis study` is at work"),
        local.only_one(tmp_path),
    ):
        pass


def test_a_file_system_without_locks_is_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with local.only_one(tmp_path):
        assert "this file system has no locks" in capsys.readouterr().err


def execute(folder: Path, runs: Sequence[PlannedRun], watch: Watcher) -> list[State]:
    with local.pool_of(local.places(1)[:1], folder / "logs") as pool:
        return launchers.execute(folder, runs, pool, watch)


def test_a_killed_worker_costs_one_run_and_the_next_call_finishes_it(
    finished: tuple[Path, Verdict, str], text: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished[0] / "corpora", tmp_path / "corpora")
    arms = {"plain": {}, "slope": {"shape.profile": "vanilla"}}
    plain = source(text, arms=arms, seeds=1)
    plain["base"] = {**plain["base"], **LONG}
    study = study_files.from_dict(plain, name="s")
    runs = lay_out(study, solve(study), Findings()).runs
    killed: list[int] = []

    def kill_first(states: Sequence[State]) -> None:
        import multiprocessing

        running = [s for s in states if s.status == "running" and s.step > 0]
        if running and not killed:
            victim = multiprocessing.active_children()[0]
            killed.append(victim.pid or 0)
            os.kill(killed[0], signal.SIGKILL)

    states = execute(tmp_path, runs, kill_first)
    assert killed and [s.status for s in states] == ["failed", "done"]
    assert "SIGKILL" in states[0].message and "memory" in states[0].message
    again = execute(tmp_path, runs, lambda states: None)
    assert [s.status for s in again] == ["done", "done"]
    assert not launchers.failure_note(tmp_path, runs[0]).exists()


def test_two_studies_side_by_side(finished: tuple[Path, Verdict, str], tmp_path: Path) -> None:
    folder = finished[0]
    plain, table, notes = compare.compare(folder, folder)
    rows = plain["arms"]
    assert {r["arm"] for r in rows} == {"plain", "slope"} and all(r["difference"] == 0 for r in rows)
    assert "a_perplexity" in rows[0] and "perplexity" in table.csv() and plain["differences"] == []
    out = io.StringIO()
    Console(file=out, width=80).print(table.rich())
    assert max(map(len, out.getvalue().splitlines())) <= 80 and "…" not in out.getvalue()
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    for path in other.rglob("result.json"):
        result = json.loads(path.read_text())
        result["data"]["tokenizer"] = "another"
        path.write_text(json.dumps({key: value for key, value in result.items() if key != SEAL}))
    plain, _, notes = compare.compare(folder, other)
    assert "a_perplexity" not in plain["arms"][0] and "perplexities are not shown" in notes[-1]
    assert [(d["what"], d["b"], d["arms"]) for d in plain["differences"]] == [
        ("data.tokenizer (fingerprint)", "another", "all")
    ]
    recipe = other / "runs/slope/seed-0/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.005", "lr: 0.001"))
    shutil.rmtree(other / "runs/plain")
    plain, _, _ = compare.compare(folder, other)
    found = {d["what"]: (d["a"], d["b"]) for d in plain["differences"]}
    assert found["arms of its own"] == (["plain"], []) and found["optimizer.lr"] == (0.005, 0.001)
    for path in other.rglob("result.json"):
        result = json.loads(path.read_text())
        result["validation"]["bytes"] += 1
        path.write_text(json.dumps({key: value for key, value in result.items() if key != SEAL}))
    with pytest.raises(UserError, match="evaluated on different texts"):
        compare.compare(folder, other)


def test_ctrl_c_saves_and_the_same_command_goes_on(
    finished: tuple[Path, Verdict, str], text: Path, tmp_path: Path
) -> None:
    from entasis.errors import Failure

    shutil.copytree(finished[0] / "corpora", tmp_path / "corpora")
    plain = source(text, arms={"plain": {}}, seeds=1)
    plain["base"] = {**plain["base"], **LONG}
    study = study_files.from_dict(plain, name="s")
    runs = lay_out(study, solve(study), Findings()).runs

    def interrupt(states: Sequence[State]) -> None:
        if states[0].step > 0 and states[0].doing != "saving, to stop":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Failure, match=r"stopped by Ctrl-C with 0 of 1 runs done; `entasis study resume"):
        execute(tmp_path, runs, interrupt)
    assert list((tmp_path / runs[0].folder / "checkpoints").iterdir())
    assert execute(tmp_path, runs, lambda states: None)[0].status == "done"


def test_files_that_arms_name_are_found_from_where_the_study_was_begun(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers stand in the study's folder; what a plan's importance is, the study holds itself."""
    from PIL import ImageFont

    font = ImageFont.load_default(16)
    assert isinstance(font, ImageFont.FreeTypeFont)
    (tmp_path / "letters.ttf").write_bytes(font.font_bytes)
    (tmp_path / "importance.json").write_text(json.dumps({"importance": [1, 2, 3, 4]}))
    monkeypatch.chdir(tmp_path)
    arms: dict[str, Any] = {
        "plain": {},
        "planned": {"training_plan": {"importance_groups": {"importance": "importance.json"}}},
        "drawn": {
            "shape.interface": {"kind": "glyph", "font": "letters.ttf"},
            "shape.tied_embeddings": False,
            "shape.budget": "60k",
        },
    }
    study = study_files.from_dict(source(text, arms=arms, seeds=1, protocols=["unmatched"]), name="s")
    console = Console(file=io.StringIO(), width=200)
    verdict = runner.run(study, tmp_path / "s", console)
    assert verdict.complete and not verdict.failed
    (tmp_path / "importance.json").unlink()
    assert runner.report(tmp_path / "s", console).complete
