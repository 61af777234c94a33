"""The grid: equal budgets, lengths set by the protocol, runs that protocols share, pairs that differ in one thing."""

import json
from typing import Any

import pytest

from entasis.errors import UserError
from entasis.study import config, plan, study_files
from entasis.study.arms import Arm, Findings
from entasis.study.equal_cost import tokens_of
from entasis.train import recipe
from entasis.train.resolve import resolve


def study(**changes: Any) -> config.Study:
    source: dict[str, Any] = {
        "base": {
            "shape": {"profile": "isotropic", "budget": "300k", "layers": 6, "d_model": 64, "head_dim": 16,
                      "vocabulary": 512, "context": 64},
            "data": {"train": "corpora/a/train", "sequence": 64},
            "tokens": 100_000,
            "batch": {"tokens": 1024},
            "optimizer": {"lr": 1e-3},
        },
        "arms": {"plain": {}, "crown": {"shape.profile": "crown"}, "deep": {"shape.layers": 10, "shape.d_model": 48}},
    }  # fmt: skip
    return study_files.from_dict(source | changes, name="s")


def test_quickstart_meets_its_budget_within_half_a_percent() -> None:
    arms = plan.solve(study_files.read("quickstart"))
    assert list(arms) == ["isotropic", "crown", "half"]
    sizes = [arm.parameters for arm in arms.values()]
    assert max(sizes) / min(sizes) < 1.005
    assert len({arm.shape.layers for arm in arms.values()}) == 2


def test_arms_of_unequal_size_are_refused_under_params_and_not_under_flops() -> None:
    arms = {"plain": {}, "big": {"shape.budget": "400k"}}
    with pytest.raises(UserError, match=r"arm big has .* from plain's .* tolerance is 0.50%"):
        plan.solve(study(arms=arms))
    assert plan.solve(study(arms=arms, protocols=["flops"]))["big"].parameters > 390_000


def test_an_impossible_arm_is_named() -> None:
    with pytest.raises(UserError, match=r"study s: arm bad: .*did you mean profile"):
        plan.solve(study(arms={"plain": {}, "bad": {"shape.profil": "crown"}}))
    with pytest.raises(UserError, match=r"arm bad: .*optimizer.rl; did you mean optimizer.lr"):
        plan.solve(study(arms={"plain": {}, "bad": {"optimizer.rl": 1}}))


def test_an_arm_s_own_parametrisation_is_not_overruled() -> None:
    standard = {"optimizer.parametrisation": "standard"}
    with pytest.raises(UserError, match=r"arm b: optimizer.parametrisation is 'standard', but .* is mup"):
        plan.solve(study(learning_rate="mup", arms={"a": {}, "b": standard}))


def test_a_mistake_in_a_sweep_s_changes_names_the_arm() -> None:
    s = study(sweep={"multipliers": [1, 2], "changes": {"batch.tokens": 1000}})
    with pytest.raises(UserError, match=r"^study s: sweep of arm plain: .*1,?000"):
        plan.preparatory(s, plan.solve(s))


def test_pairs_differ_in_shape_alone() -> None:
    s = study()
    layout = plan.lay_out(s, plan.solve(s), Findings())
    for base, arm in zip(layout.grid["params"]["plain"], layout.grid["params"]["crown"], strict=True):
        assert base.recipe["seed"] == arm.recipe["seed"] == base.seed
        assert {k: v for k, v in base.recipe.items() if k != "shape"} == {
            k: v for k, v in arm.recipe.items() if k != "shape"
        }
        assert base.recipe["shape"] != arm.recipe["shape"]


def test_equal_flops_stretch_the_tokens() -> None:
    s = study(protocols=["params", "flops"], tolerance=0.1)
    arms = plan.solve(s)
    layout = plan.lay_out(s, arms, Findings())
    base = layout.grid["flops"]["plain"][0]
    for name, runs in layout.grid["flops"].items():
        # Within half a batch of the baseline's compute.
        assert abs(runs[0].flops - base.flops) <= 512 * arms[name].flops_per_token
        assert runs[0].tokens % 1024 == 0


def test_runs_that_two_protocols_share_are_trained_once() -> None:
    s = study(protocols=["params", "flops"], tolerance=0.1)
    layout = plan.lay_out(s, plan.solve(s), Findings())
    folders = [run.folder for run in layout.runs]
    assert len(folders) == len(set(folders))
    assert layout.grid["flops"]["plain"][0].folder == "runs/plain/seed-0"
    assert layout.grid["flops"]["deep"][0].folder == "runs/deep@flops/seed-0"
    assert [run.seed for run in layout.runs] == sorted(run.seed for run in layout.runs)


def test_equal_time_follows_the_measured_speed() -> None:
    s = study(protocols=["time"], hours=0.01)
    arms = plan.solve(s)
    assert not plan.preparatory(s, arms)
    layout = plan.lay_out(s, arms, Findings(tokens_per_second={"plain": 1000, "crown": 2000, "deep": 500}))
    tokens = {name: runs[0].tokens for name, runs in layout.grid["time"].items()}
    assert tokens == {"plain": 35 * 1024, "crown": 70 * 1024, "deep": 18 * 1024}


def test_a_sweep_tries_every_arm_and_its_best_rate_is_used() -> None:
    s = study(sweep={"multipliers": [0.5, 1, 2], "changes": {"tokens": 20_000}})
    arms = plan.solve(s)
    runs = plan.preparatory(s, arms)
    assert len(runs) == 9 and {r.tokens for r in runs} == {20 * 1024}
    assert {r.recipe["optimizer"]["lr"] for r in runs} == {5e-4, 1e-3, 2e-3}
    layout = plan.lay_out(s, arms, Findings(multiplier={"plain": 1.0, "crown": 2.0, "deep": 0.5}))
    assert layout.grid["params"]["crown"][0].recipe["optimizer"]["lr"] == 2e-3
    assert layout.grid["params"]["crown"][0].tokens == 98 * 1024  # the full length, in whole batches


def test_mup_scales_every_arm_from_the_baseline_s_width() -> None:
    arms = plan.solve(study(learning_rate="mup"))
    assert {a.recipe["optimizer"]["base_width"] for a in arms.values()} == {64}


def test_arms_that_round_to_one_shape_are_pointed_out() -> None:
    arms = plan.solve(
        study(arms={"plain": {}, "twin": {"shape.profile": "isotropic"}, "crown": {"shape.profile": "crown"}})
    )
    assert arms["twin"].notes[-1] == "the same shape and recipe as plain"
    assert not any("same shape" in note for note in arms["plain"].notes + arms["crown"].notes)


def scales(arms: dict[str, Arm]) -> dict[str, list[object]]:
    return {
        name: [arm.recipe["shape"][key] for key in ("logit_scale", "attention_scale")]
        for name, arm in arms.items()
    }


WIDTHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": {"shape.d_model": 128, "shape.head_dim": 64, "shape.budget": "1M"},
    "normed": {"shape.head_dim": 64, "shape.qk_norm": "head"},
}


def test_mup_writes_its_scales_into_every_arm_s_shape() -> None:
    """A run reads the shape in full: what the plan leaves at its default stays so."""
    arms = plan.solve(study(learning_rate="mup", arms=WIDTHS, protocols=["flops"]))
    expected = {"plain": [1.0, None], "wide": [0.5, 16**0.5 / 64], "normed": [1.0, None]}
    assert scales(arms) == expected
    assert {a.recipe["optimizer"]["base_head_dim"] for a in arms.values()} == {16}
    own = study(learning_rate="mup", arms={"plain": {}, "wide": {**WIDTHS["wide"], "shape.logit_scale": 2.0}},
                protocols=["flops"])  # fmt: skip
    arms = plan.solve(own)
    assert scales(arms)["wide"] == [2.0, 16**0.5 / 64]
    assert arms["wide"].notes[-1] == "logit_scale is 2.0 as the shape says, where muP has 0.5"


@pytest.mark.parametrize("asked", ["the study", "the recipe"])
def test_a_study_trains_the_shape_that_train_makes_of_the_same_recipe(asked: str) -> None:
    mup = {"lr": 1e-3, "parametrisation": "mup", "base_width": 32, "base_head_dim": 8}
    asks = {"learning_rate": "mup"} if asked == "the study" else {}
    s = study(arms=WIDTHS, protocols=["flops"], **asks)
    s.base["optimizer"] = mup
    arms = plan.solve(s)
    for run in plan.lay_out(s, arms, Findings()).runs:
        written = config.changed(s.base, s.arms[run.arm])
        _, trained, _ = resolve(recipe.from_dict(written), 512)
        _, studied, notes = resolve(recipe.from_dict(run.recipe), 512)
        assert studied == trained
        assert not notes


def test_arms_may_start_from_weights_and_freeze(tmp_path) -> None:
    """Under equal FLOPs an arm whose lower half is frozen trains on more tokens."""
    from entasis.shape import cost
    from entasis.shape.selectors import select

    shape = plan.solve(study(arms={"plain": {}}))["plain"].shape
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "shape.json").write_text(json.dumps(shape.to_dict()))
    arms = {
        "all": {},
        "top": {"stages": [{"trainable": "blocks[-1]"}], "start.from": str(folder), "shape": None},
    }
    made = study(arms=arms, protocols=["flops"])
    solved = plan.solve(made)
    assert solved["top"].shape == shape == solved["all"].shape
    sequence = solved["top"].recipe["data"]["sequence"]
    cheap = cost.stage_flops_per_token(shape, select(shape, "blocks[-1]"), sequence)
    assert solved["top"].flops_per_token == cheap < solved["all"].flops_per_token
    tokens = [tokens_of(made, solved, solved[arm], "flops", Findings()) for arm in arms]
    assert tokens[1] / tokens[0] == pytest.approx(solved["all"].flops_per_token / cheap, rel=0.01)
    with pytest.raises(UserError, match=r"arm top: .*stages\[0\].trainable: no parameter matches"):
        plan.solve(study(arms={**arms, "top": {**arms["top"], "stages": [{"trainable": "blocks[99:]"}]}}))
