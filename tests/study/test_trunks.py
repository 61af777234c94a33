"""Arms that start from a trunk's run: shapes and lengths before anything runs, then one small study for real."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

from entasis import cli
from entasis.errors import UserError
from entasis.study import config, plan, study_files, trunks
from entasis.study.arms import Findings
from entasis.study.equal_cost import before_run
from entasis.train import recipe as recipes
from entasis.train.resolve import resolve
from entasis.train.stages import lay_out

pytestmark = pytest.mark.xdist_group("trunks")

LAYERS = [{"n_heads": 4, "n_kv_heads": 4, "d_ff": 64}] * 4
TWICE = {"grow": {"operator": "stack", "times": 2}}
SMALL = {"start": {"from": {"trunk": "small"}}}


def source(**changes: Any) -> dict[str, Any]:
    return {
        "base": {
            "shape": {"layers": LAYERS, "d_model": 32, "head_dim": 8, "vocabulary": 512, "context": 32,
                      "tied_embeddings": True},
            "data": {"train": "corpora/code/train", "validation": "corpora/code/validation", "sequence": 32},
            "tokens": 4096,
            "batch": {"tokens": 256},
            "optimizer": {"lr": 5e-3},
        },
        "trunks": {"small": {"tokens": 2048}},
        "arms": {
            "plain": SMALL,
            "grown": {**SMALL, "stages": [{"tokens": 1024}, {"transition": TWICE, "trainable": "newest"}]},
            "scratch": {"shape.layers": LAYERS * 2},
        },
        "seeds": 2,
        "protocols": ["flops"],
    } | changes  # fmt: skip


def study(**changes: Any) -> config.Study:
    return study_files.from_dict(source(**changes), name="s")


def test_equal_flops_stretch_the_last_stage_and_count_the_trunk() -> None:
    s = study()
    arms = plan.solve(s)
    assert list(arms) == ["small", "plain", "grown", "scratch"]
    assert arms["plain"].shape == arms["small"].final_shape
    assert arms["grown"].final_shape.n_layers == 8 and arms["grown"].stage_tokens == [1024, 3072]
    grid = plan.lay_out(s, arms, Findings()).grid["flops"]
    before = arms["small"].flops([2048])
    spent = {name: runs[0].flops + (before if runs[0].needs else 0) for name, runs in grid.items()}
    for name in ("grown", "scratch"):
        half_a_batch = 128 * arms[name].stages[-1].flops_per_token
        assert abs(spent[name] - spent["plain"]) <= half_a_batch
    first, last = grid["grown"][0].recipe["stages"]
    assert first["tokens"] == 1024 and last["tokens"] == grid["grown"][0].tokens - 1024
    assert grid["plain"][0].tokens == 4096 and grid["scratch"][0].tokens < 4096


def test_stages_that_are_shares_stay_these_shares_at_equal_flops() -> None:
    stages = [{"tokens": "25%"}, {"tokens": "25%", "transition": TWICE}, {"trainable": "newest"}]
    s = study(trunks={}, arms={"plain": {"shape.layers": LAYERS * 2}, "grown": {"shape.layers": LAYERS, "stages": stages}},
              base={**source()["base"], "tokens": 256 * 400})  # fmt: skip
    arms = plan.solve(s)
    runs = plan.lay_out(s, arms, Findings()).grid["flops"]
    plain, grown = runs["plain"][0], runs["grown"][0]
    assert abs(grown.flops - plain.flops) <= 128 * arms["grown"].stages[-1].flops_per_token
    lengths = [stage["tokens"] for stage in grown.recipe["stages"]]
    assert sum(lengths) == grown.tokens > 1.2 * plain.tokens
    assert [n / grown.tokens for n in lengths] == pytest.approx([0.25, 0.25, 0.5], abs=0.003)


def test_each_run_starts_from_the_trunk_of_its_own_seed() -> None:
    s = study(sweep=[0.5, 1])
    arms = plan.solve(s)
    runs = plan.lay_out(s, arms, Findings()).runs
    starts = {r.folder: r.recipe.get("start") and r.recipe["start"]["from"] for r in runs}
    assert starts["runs/plain/seed-1"] == starts["runs/grown/seed-1"] == "trunks/small/seed-1"
    assert starts["runs/scratch/seed-1"] is None
    assert {r.recipe["start"]["data_position"] for r in runs if r.needs} == {"keep"}
    assert [r.folder for r in trunks.needed(runs)] == ["trunks/small/seed-0", "trunks/small/seed-1"]
    assert [r.folder for r in trunks.needed(plan.preparatory(s, arms))] == ["trunks/small/seed-1000"]
    assert trunks.needed(runs)[1].recipe["seed"] == 1 and "start" not in trunks.needed(runs)[1].recipe


def test_an_arm_whose_stages_speak_of_new_layers_is_timed_without_the_trunk() -> None:
    stages = [
        {"tokens": 1024, "transition": TWICE, "trainable": "newest", "warmup_new": "10%"},
        {"tokens": 1024, "trainable": "newest", "anneal": [{"on": "newest", "part": [0, 1]}]},
        {"trainable": ["final_norm"], "lora": {"rank": 2, "on": "newest"}},
    ]
    arm = plan.solve(study(arms={"plain": SMALL, "grown": {**SMALL, "stages": stages}}))["grown"]
    timed = recipes.from_dict(arm.timed)
    resolved, shape, _ = resolve(timed, 512)
    for there, here in zip(arm.stages, lay_out(resolved, shape), strict=True):
        assert here.flops_per_token == there.flops_per_token and here.adapted == there.adapted
        assert here.trainable == there.trainable and here.shape == there.shape


def test_a_trunk_may_start_from_another_and_the_base_from_one() -> None:
    s = study(
        base={**source()["base"], **SMALL},
        trunks={"tiny": {"tokens": 512}, "small": {"start.from.trunk": "tiny", "tokens": 2048}},
        arms={"plain": {}, "slow": {"optimizer.lr": 1e-3}},
        protocols=["params"],
    )
    arms = plan.solve(s)
    assert (arms["tiny"].trunk, arms["small"].trunk, arms["plain"].trunk) == (None, "tiny", "small")
    assert before_run(arms, arms["slow"])[0] == 2560
    assert [r.arm for r in trunks.needed(plan.lay_out(s, arms, Findings()).runs)] == ["tiny", "small"] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"a": {"start": {"from": {"trunk": "smal"}}}}}, "a starts from the trunk 'smal'.*did you mean small"),
        ({"arms": {"a": {"start": {"from": {"arm": "small"}}}}}, r"start.from is .*\{trunk: NAME\}"),
        ({"arms": {"a": {}}}, "nothing starts from the trunk small"),
        ({"trunks": {"small": {}, "plain": {}}}, "plain is an arm and a trunk"),
        ({"trunks": {"small": {"start.from.trunk": "small"}}}, "no trunk above it"),
        ({"arms": {"a": SMALL, "b": {**SMALL, "shape.d_model": 64}}}, "arm b: .*shape is another"),
        ({"trunks": {"small": {"tokens": "1M"}}, "baseline": "scratch"}, "plain cannot be matched by flops"),
        ({"arms": {"a": {}, "b": SMALL}, "protocols": ["time"]}, "b and a do not start from the same trunk"),
        ({"arms": {"a": {}, "b": SMALL}, "protocols": ["params"]}, "b trains on 6,144 tokens, its trunk's with them"),
        ({"arms": {"a": {}, "b": {**SMALL, "stages": [{"tokens": 4096}, {"tokens": 512}]}}},
         "b cannot be matched by flops"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_runs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan.solve(study(**changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of grown models, begun by the command in another folder than the one its files name."""
    folder = tmp_path_factory.mktemp("trunks")
    (folder / "text").mkdir()
    for name in ("argparse", "ast", "difflib", "inspect", "tarfile", "typing"):
        shutil.copy(Path(os.__file__).with_name(f"{name}.py"), folder / "text")
    plain = source(
        corpora={"code": {"sources": ["text"], "train_tokenizer": 512, "validation": 0.3}}, threads=1
    )
    plain["base"] |= {
        "precision": "fp32",
        "attention": "sdpa",
        "compile": False,
        "logging": {"tensorboard": False},
        "checkpoint": {"every": None},
    }
    (folder / "s.yaml").write_text(yaml.safe_dump(plain))
    with pytest.MonkeyPatch.context() as at:
        at.chdir(folder)
        assert cli.main(["study", "run", "s.yaml", "--output", "out"]) == 0
    return folder / "out"


@pytest.mark.slow
def test_a_study_trains_its_trunks_first_and_arms_from_their_weights(finished: Path) -> None:
    verdict = json.loads((finished / "verdict.json").read_text())
    assert (verdict["finished"], verdict["complete"], verdict["comparisons"]) == (6, True, 2)
    trunk = load_file(finished / "trunks/small/seed-1/model.safetensors")
    grown = load_file(finished / "runs/grown/seed-1/model.safetensors")
    assert len({name.split(".")[1] for name in grown if name.startswith("blocks.")}) == 8
    told = json.loads((finished / "runs/grown/seed-1/environment.json").read_text())["start"]
    assert told["from"] == "trunks/small/seed-1"
    assert trunk.keys() < grown.keys()
    arm = verdict["protocols"]["flops"]["arms"]["grown"]
    assert arm["trunk"]["tokens"] == 2048 and arm["layers"] == 8
    rows = list(csv.DictReader((finished / "tables/cost-flops.csv").open()))
    costs = {row["arm"]: float(row["training_flops"]) + float(row["trunk_flops"] or 0) for row in rows}
    assert costs["grown"] == pytest.approx(costs["scratch"], rel=0.05)
    assert "starts from the run of the trunk small" in (finished / "report.html").read_text()


@pytest.mark.slow
def test_an_interrupted_study_goes_on_and_trunks_are_trained_only_where_they_are_needed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    before = load_file(moved / "runs/grown/seed-1/model.safetensors")
    for gone in ("runs/grown/seed-1", "trunks/small/seed-0", "trunks/small/seed-1"):
        shutil.rmtree(moved / gone)
    assert cli.main(["study", "resume", str(moved)]) == 0
    assert (moved / "trunks/small/seed-1/result.json").is_file() and not (
        moved / "trunks/small/seed-0"
    ).exists()
    again = load_file(moved / "runs/grown/seed-1/model.safetensors")
    assert all((again[name] == before[name]).all() for name in before)
    capsys.readouterr()
    assert (
        cli.main(["study", "plan", str(moved / "study.yaml"), "--output", str(moved), "--quick", "--json"])
        == 0
    )
    rows = json.loads(capsys.readouterr().out)
    assert (rows["trunk_runs"], rows["runs"]) == (2, 6)
    assert [r["arm"] for r in rows["rows"] if r["protocol"] == "trunk"] == ["small"]


@pytest.mark.slow
def test_compare_names_what_a_trunk_changes(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    plain = yaml.safe_load((other / "study.yaml").read_text())
    plain["trunks"]["small"] = {"tokens": "4k", "optimizer.lr": 1e-3}
    (other / "study.yaml").write_text(yaml.safe_dump(plain))
    assert cli.main(["study", "compare", str(finished), str(other)]) == 0
    told = capsys.readouterr().out
    assert "trunks.small.tokens: 2,048 in A, 4k in B" in told
    assert "trunks.small.optimizer.lr: None in A, 0.001 in B" in told
    assert "Both say the same" not in told
