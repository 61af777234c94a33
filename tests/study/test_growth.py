"""Studies that grow: which folder takes which study, and what is planned anew. Nothing is trained here."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from entasis.errors import UserError
from entasis.study import growth, results, runner, study_files
from entasis.study.arms import Findings
from entasis.study.config import Study
from entasis.study.plan import lay_out, preparatory, solve
from entasis.study.stopping import Until


def study(**changes: Any) -> Study:
    plain = {
        "base": {
            "shape": {"profile": "isotropic", "budget": "40k", "layers": 4, "d_model": 32, "head_dim": 8,
                      "vocabulary": 512, "tied_embeddings": True, "context": 32},
            "data": {"train": "/c/train", "validation": "/c/validation", "sequence": 32},
            "tokens": 4096,
            "batch": {"tokens": 256},
        },
        "arms": {"plain": {}, "slope": {"shape.profile": "vanilla"}},
        "seeds": 3,
    } | changes  # fmt: skip
    return study_files.from_dict(plain, name="s")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose study has a finished run."""
    growth.begin(study(), tmp_path / "s")
    (tmp_path / "s/runs/plain/seed-0").mkdir(parents=True)
    (tmp_path / "s/runs/plain/seed-0/result.json").write_text("{}")
    return tmp_path / "s"


def test_until_takes_the_next_seeds_and_comes_back_from_the_study_file(tmp_path: Path) -> None:
    s = study(seeds=[3, 5], until={"detectable": 0.01, "seeds": 5})
    assert s.seeds == [3, 5, 0, 1, 2] and s.until == Until(seeds=5, detectable=0.01)
    growth.begin(s, tmp_path / "s")
    assert growth.stored(tmp_path / "s") == s


@pytest.mark.parametrize(
    ("until", "message"),
    [
        ({"detectable": 0}, "detectable"),
        ({"method": "peeking"}, "method"),
        ({"sedes": 5}, "did you mean|seeds"),
        ({"looks": [6, 4]}, "ascending"),
        ({"looks": [6, 40], "seeds": 20}, "no more than seeds, which is 20"),
        ({"g": -1}, "g"),
    ],
)
def test_what_until_gets_wrong_is_said_in_a_line(until: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        study(until=until)


def test_more_seeds_before_the_first_result_are_planned_anew(tmp_path: Path) -> None:
    growth.begin(study(), tmp_path)
    grown, notes = growth.begin(study(seeds=8), tmp_path)
    assert grown.until is None and notes == ["planned anew: no run is finished yet"]
    assert not (tmp_path / growth.FIRST).exists() and growth.stored(tmp_path).seeds == list(range(8))


def test_more_seeds_after_it_are_judged_by_the_valid_sequence(folder: Path) -> None:
    grown, notes = growth.begin(study(seeds=8), folder)
    assert grown.until == Until(seeds=8) and grown.seeds == list(range(8))
    assert "no p of a fixed number of seeds is claimed" in notes[1]
    first = growth.first(folder)
    assert first == study() and growth.stored(folder) == grown
    # The first command still means this study; a second growth keeps what was first.
    assert growth.intended(study(), folder)[0] == grown
    again, _ = growth.begin(study(until={"detectable": 0.01, "seeds": 20}), folder)
    assert again.until == Until(seeds=20, detectable=0.01) and growth.first(folder) == first
    # The most may be lowered, what is there stays.
    fewer, _ = growth.begin(study(until={"detectable": 0.01, "seeds": 12}), folder)
    assert fewer.until == Until(seeds=12, detectable=0.01) and fewer.seeds == again.seeds


def test_a_new_arm_leaves_a_fixed_study_fixed(folder: Path) -> None:
    arms = {"plain": {}, "slope": {"shape.profile": "vanilla"}, "taper": {"shape.profile": "taper"}}
    grown, notes = growth.begin(study(arms=arms), folder)
    assert grown.until is None and list(grown.arms) == list(arms) and notes == ["new: taper"]


def test_finished_runs_may_be_asked_further_tasks(folder: Path) -> None:
    asking = study(downstream={"continuation": {"items": 50}})
    grown, notes = growth.begin(asking, folder)
    assert grown == asking == growth.stored(folder) and not notes
    assert grown.until is None and growth.first(folder) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"plain": {}, "slope": {"shape.profile": "crown"}}},
         "holds another arm slope: shape.profile is vanilla there and crown here; give it another name"),
        ({"arms": {"plain": {}, "steep": {"shape.profile": "vanilla"}}}, "it has an arm slope, this one has not"),
        ({"arms": {"plain": {}, "slope": {"shape.profile": "vanilla", "control": True}}}, "control"),
        ({"margin": 0.5}, "margin is 0.01 there and 0.5 here"),
        ({"seeds": 2}, "more than 2; what is planned is not taken away: write seeds=3"),
        ({"seeds": [4, 5, 6]}, r"holds seeds \[0, 1, 2\], not \[4, 5, 6\]"),
        ({"until": {"g": 4.0}}, "looks and until.g are planned before the first run"),
        ({"until": {"method": "looks"}}, "looks and until.g are planned before the first run"),
    ],
)  # fmt: skip
def test_what_is_not_growth_is_refused_with_both_values(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    before = (folder / growth.FILE).read_text()
    with pytest.raises(UserError, match=message):
        growth.begin(study(**changes), folder)
    assert (folder / growth.FILE).read_text() == before


def refused(s: Study, folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        runner.run(s, folder, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"plain": {}, "thin": {"shape.budget": "36k"}}}, "the tolerance is 0.50%"),
        ({"arms": {"plain": {}, "slope": {"shape.profil": "vanilla"}}}, "arm slope: .*profil"),
        ({"arms": {"plain": {}, "blind": {"data.validation": None}}}, "no data.validation to be judged on"),
        ({"until": {"detectable": 0.01, "seeds": 3}}, "nothing can be said before 5 seeds"),
    ],
)  # fmt: skip
def test_a_study_that_cannot_run_is_not_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refused(study(**changes), tmp_path / "s", message)
    assert not (tmp_path / "s").exists()


def test_an_own_tokenizer_that_is_still_to_be_trained_gives_the_vocabulary(tmp_path: Path) -> None:
    shape = {k: v for k, v in study().base["shape"].items() if k != "vocabulary"}
    data = {"train": "corpora/b/train", "validation": "corpora/b/validation", "sequence": 32}
    corpora = {
        "a": {"sources": ["stdlib"], "train_tokenizer": 300},
        "b": {"sources": ["stdlib"], "tokenizer": "bytes"},
    }
    s = study(base={**study().base, "shape": shape, "data": data}, corpora=corpora)
    arms, _, _ = runner.foreseen(s, tmp_path)
    assert arms["plain"].shape.vocabulary == 257


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"shape.profil": "taper"}, "arm taper: .*profil"), ({"shape.budget": "36k"}, "the tolerance is 0.50%")],
)
def test_a_new_arm_that_cannot_run_leaves_the_folder_as_it_was(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    before = (folder / growth.FILE).read_text()
    arms = {"plain": {}, "slope": {"shape.profile": "vanilla"}}
    refused(study(arms={**arms, "taper": changes}), folder, message)
    assert (folder / growth.FILE).read_text() == before and growth.first(folder) is None
    mended = study(arms={**arms, "taper": {"shape.profile": "taper"}})
    assert growth.intended(mended, folder) == (mended, ["new: taper"])


def test_a_sweep_run_is_wanted_until_runs_have_begun_at_the_rate_chosen_without_it(tmp_path: Path) -> None:
    s = study(
        sweep=[0.5, 1], arms={"plain": {}, "slope": {"shape.profile": "vanilla"}, "half": {"control": True}}
    )
    runs = preparatory(s, solve(s))

    def begin(name: str) -> list[str]:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "recipe.yaml").write_text("")
        return [run.folder for run in results.too_late(s, tmp_path, runs)]

    done = tmp_path / "sweep/slope/lr-1/seed-1000"
    done.mkdir(parents=True)
    (done / "result.json").write_text("{}")
    assert begin("sweep/slope/lr-0.5/seed-1000") == []
    assert begin("runs/slope@flops/seed-0") == ["sweep/slope/lr-0.5/seed-1000"]
    # A control is trained at the baseline's rate.
    assert {name.split("/")[1] for name in begin("runs/half/seed-0")} == {"plain", "slope"}


def test_equal_time_is_taken_as_equal_flops_until_the_speeds_of_all_arms_are_known(tmp_path: Path) -> None:
    s = study(protocols=["time"])

    def lengths(**speeds: float) -> dict[str, int]:
        told = {"tokens_per_second": {name: [[speed]] for name, speed in speeds.items()}}
        (tmp_path / "throughput.json").write_text(json.dumps(told))
        return {name: runs[0].tokens for name, runs in runner.foreseen(s, tmp_path)[2].grid["time"].items()}

    assumed = lengths(plain=100.0)
    assert assumed["plain"] == 4096 and assumed["slope"] == pytest.approx(4096, rel=0.1)
    assert lengths(plain=100.0, slope=50.0) == {"plain": 4096, "slope": 2048}


def test_planned_looks_stay_as_planned_or_give_way_to_the_anytime_valid_t(tmp_path: Path) -> None:
    looks = {"method": "looks", "detectable": 0.01, "seeds": 12}
    growth.begin(study(until=looks), tmp_path)
    (tmp_path / "runs/plain/seed-0").mkdir(parents=True)
    (tmp_path / "runs/plain/seed-0/result.json").write_text("{}")
    with pytest.raises(UserError, match=r"until.seeds is 12 there and 20 here.*until.method=anytime"):
        growth.intended(study(until=looks | {"seeds": 20}), tmp_path)
    grown, notes = growth.begin(study(until={"detectable": 0.01, "seeds": 20}), tmp_path)
    assert grown.until == Until(seeds=20, detectable=0.01) and "no p of the looks is claimed" in notes[-1]


def test_a_control_is_half_as_long_and_exempt_from_equal_cost_and_from_the_family() -> None:
    arms = {"plain": {}, "slope": {"shape.profile": "vanilla"}, "half": {"control": True},
            "thin": {"shape.budget": "38k", "control": True}}  # fmt: skip
    s = study(arms=arms, protocols=["params", "flops", "time"], hours=0.5)
    assert s.controls == ["half", "thin"] and s.arms["half"] == {"tokens": 2048}
    solved = solve(s)
    # Under time the baseline gets 1.8 M tokens, and the control half of them.
    plan = lay_out(s, solved, Findings(tokens_per_second=dict.fromkeys(s.arms, 1000.0)))
    assert plan.grid["params"]["half"][0].tokens == 2048 and plan.grid["params"]["thin"][0].tokens == 4096
    assert plan.grid["flops"]["half"][0] == plan.grid["params"]["half"][0]
    assert plan.grid["time"]["half"][0].tokens == pytest.approx(
        plan.grid["time"]["plain"][0].tokens / 2, abs=256
    )
    assert {c.arm for c in plan.comparisons(s)} == {"slope"}
    assert {c.arm for c in plan.controls(s).values()} == {"half", "thin"}


def test_controls_must_be_what_they_say() -> None:
    with pytest.raises(UserError, match=r"arms.slope.control is 'yes'; write true, or leave it out"):
        study(arms={"plain": {}, "slope": {"control": "yes"}})
    with pytest.raises(UserError, match="is the baseline, and cannot be its own control"):
        study(arms={"plain": {"control": True}, "slope": {}})
    with pytest.raises(UserError, match="control same is plain itself"):
        solve(study(arms={"plain": {}, "same": {"control": True, "tokens": 4096}}))


def test_a_study_file_keeps_its_controls(tmp_path: Path) -> None:
    s = study(arms={"plain": {}, "half": {"control": True}})
    growth.begin(s, tmp_path / "s")
    assert growth.stored(tmp_path / "s") == s
    assert s.replaced(controls=[]) != s


@pytest.mark.parametrize("name", study_files.shipped())
def test_shipped_studies_have_a_control_at_every_size(name: str) -> None:
    text = Path(study_files.__file__).parent.joinpath("studies", f"{name}.yaml").read_text(encoding="utf-8")
    for size in yaml.safe_load(text).get("sizes") or ["nano" if "\nextends:" in text else None]:
        s = study_files.read(name, size=size)
        assert s.controls
        arms = solve(s, 50_304)
        half = sum(arms[s.baseline].stage_tokens) / 2
        trained = sum(arms[s.controls[0]].stage_tokens)
        assert trained == pytest.approx(half / 5 if (name, size) == ("budgets", "paper") else half, rel=0.01)
