"""Runs whose layers learn by a training plan."""

import itertools
import json
import math

import pytest
from safetensors.torch import load_file

from entasis.cli import main
from entasis.errors import Stopped, UserError
from entasis.shape import cost
from entasis.train import recipe as recipes
from entasis.train.metrics import records
from entasis.train.resolve import resolve
from entasis.train.run import train
from entasis.train.stage_runner import StageRunner
from entasis.train.timeline import Timeline

SCHEDULE = {"name": "warmup-stable-decay", "warmup": 3, "decay": "40%"}
ONLINE = {"importance": {"measure": "skip", "tokens": 512, "after": 0.3}, "groups": 2, "final": 0.3}


def losses(folder):
    return [r["loss"] for r in records(folder)]


def test_a_plan_in_which_all_layers_learn_is_a_plain_run_to_the_bit(recipe, tmp_path):
    """Stages that join: moments, schedule and data go on as if there were none."""
    train(recipe(tokens=512 * 12, schedule=SCHEDULE), tmp_path / "plain")
    plan = {"lisa": {"layers": 2, "every": 3}}
    train(recipe(tokens=512 * 12, schedule=SCHEDULE, training_plan=plan), tmp_path / "planned")
    assert losses(tmp_path / "planned") == losses(tmp_path / "plain")
    assert [r["lr"] for r in records(tmp_path / "planned")] == [r["lr"] for r in records(tmp_path / "plain")]


def test_at_equal_flops_a_measuring_run_ends_at_the_budget_and_says_what_it_measured(recipe, tmp_path):
    wanted = recipe(
        tokens=512 * 20,
        training_plan={"importance_groups": {**ONLINE, "spend": "flops", "always": ["head", "final_norm"]}},
    )
    result = train(wanted, tmp_path)
    budget = 512 * 20 * cost.flops_per_token(shape_of(tmp_path), 64)
    spent = result["tokens"] * result["flops_per_token"] + result["importance"]["flops"]
    assert spent == pytest.approx(budget, rel=0.03)
    assert result["tokens"] > 512 * 20
    (layers,) = result["importance"]["layers"]
    assert len(layers) == 2 and result["importance"]["measure"] == "skip"
    # Its checkpoint is that of the last step, which only what was measured tells.
    (tmp_path / "result.json").write_text("{")
    assert train(wanted, tmp_path)["validation"] == result["validation"]


@pytest.mark.parametrize(
    "plan", [{"importance_groups": ONLINE}, {"autofreeze": {"looks": 2, "tokens": 512}}, {"lisa": {}}]
)
def test_shares_are_of_the_whole_run_also_before_a_plan_has_measured(recipe, plan):
    every = {"evaluation": {"every": "25%"}, "checkpoint": {"every": "10%"}}
    resolved, *_ = resolve(recipe(tokens=512 * 100, training_plan=plan, **every), 512)
    assert (resolved.evaluation.every, resolved.checkpoint.every) == (25, 10)


@pytest.mark.parametrize(
    "plan", [{"importance_groups": ONLINE}, {"autofreeze": {"looks": 9, "tokens": 64}}, {"freezeout": {}}]
)
@pytest.mark.parametrize("spend", ["tokens", "flops"])
def test_the_steps_of_a_recipe_are_of_the_whole_run_before_its_plan_has_measured(recipe, plan, spend):
    (options,) = plan.values()
    wanted = {name: {**options, "spend": spend} for name in plan}
    resolved, shape, _ = resolve(recipe(tokens=512 * 100, training_plan=wanted), 257)
    assert resolved.total_steps == Timeline(resolved, shape, []).guessed().spans[-1].stop > 98
    assert resolved.total_steps == 100 or spend == "flops"


def test_at_equal_flops_a_schedule_in_steps_falls_without_jumps(recipe, tmp_path):
    """Stretches have steps of their own price, and yet one schedule: a number of steps is a share of the run's."""
    schedule = {"name": "warmup-stable-decay", "warmup": 0, "decay": 20}
    plan = {"freezeout": {"spend": "flops", "t0": 0.8}}
    train(recipe(tokens=512 * 20, schedule=schedule, training_plan=plan), tmp_path)
    rates = [r["lr"] for r in records(tmp_path)]
    falls = [a - b for a, b in itertools.pairwise(rates)]
    assert len(rates) > 20 and min(falls) > 0 and max(falls) < 2.5 * min(falls)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"autofreeze": {"looks": 41, "tokens": 64}}, "none of 20 steps falls on its first stretch"),
        ({"importance_groups": {"importance": {"after": 0.01, "tokens": 64}, "groups": 2}}, "none of 20 steps"),
        ({"importance_groups": {"importance": {"after": 0.1, "tokens": "1M"}, "groups": 2}}, "take more than half"),
        ({"freezeout": {"always": []}}, "always is empty, and in one stretch no layer learns either"),
        ({"lisa": {"every": 0}}, "every is 0; a period has a step at least"),
    ],
)  # fmt: skip
def test_plans_that_cannot_begin_are_refused(recipe, plan, says):
    with pytest.raises(UserError, match=says):
        resolve(recipe(tokens=512 * 20, training_plan=plan), 512)


@pytest.mark.parametrize("stop_at", [3, 6, 9])
def test_a_measuring_run_goes_on_as_if_it_had_not_been_stopped(recipe, tmp_path, stop_at):
    """Step 6 is the end of the stage before the measurement."""
    wanted = recipe(tokens=512 * 20, training_plan={"importance_groups": ONLINE}, checkpoint={"every": 3})
    whole = train(wanted, tmp_path / "whole")
    assert whole["stages"][0]["tokens"] == 512 * 6

    def interrupt(event):
        if event["event"] == "checkpoint" and event["step"] == stop_at:
            raise Stopped("now")

    with pytest.raises(Stopped):
        train(wanted, tmp_path / "stopped", reporter=interrupt)
    again = train(wanted, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert again["importance"] == whole["importance"]
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("layer_lr", ["unscaled", "scaled"])
def test_freezeout_s_layers_learn_at_the_paper_s_rates(recipe, tmp_path, monkeypatch, layer_lr, name):
    """At every step of a run, by the formula of 1706.04983; layer i is frozen after t_i of the steps."""
    steps, lr, times = 24, 1e-2, {"0": 0.5**3, "1": 0.75**3}
    used = []
    step = StageRunner.step

    def watched(self, norm):
        of = {p: g["lr"] for o in self.optimizers for g in o.param_groups for p in g["params"]}
        used.append({name: of[p] for name, p in self.model.named_parameters() if p in of})
        step(self, norm)

    monkeypatch.setattr(StageRunner, "step", watched)
    plan = {"freezeout": {"layer_lr": layer_lr}}
    changes = {"schedule": {"name": "constant", "warmup": 0}, "optimizer": {"name": name, "lr": lr}}
    train(recipe(tokens=512 * steps, training_plan=plan, **changes), tmp_path)
    assert len(used) == steps
    for j, rates in enumerate(used):
        for name, found in rates.items():
            layer = name.split(".")[1] if name.startswith("blocks") else None
            time = times["0"] if name.startswith("embedding") else times.get(layer, 1.0)
            scale = 1 / time if layer_lr == "scaled" else 1
            assert found == pytest.approx(lr * scale * (1 + math.cos(math.pi * j / steps / time)) / 2), (
                j,
                name,
            )
        learning = {name.split(".")[1] for name in rates if name.startswith("blocks")}
        assert learning == {i for i, time in times.items() if j < round(time * steps)}
        assert any(name.startswith("embedding") for name in rates) == ("0" in learning)


@pytest.mark.parametrize("stop_at", [3, 6, 9])
def test_a_run_goes_on_within_a_stage_of_falling_rates(recipe, tmp_path, stop_at):
    """Stages begin at the steps 0, 8 and 11."""
    plan = {"freezeout": {"layer_lr": "scaled", "t0": 0.5, "cubed": False}}
    wanted = recipe(tokens=512 * 16, training_plan=plan, checkpoint={"every": 3})
    train(wanted, tmp_path / "whole")

    def interrupt(event):
        if event["event"] == "checkpoint" and event["step"] == stop_at:
            raise Stopped("now")

    with pytest.raises(Stopped):
        train(wanted, tmp_path / "stopped", reporter=interrupt)
    train(wanted, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    train(recipe(tokens=512 * 16, training_plan={"freezeout": {"cubed": False}}), tmp_path / "shared")
    assert losses(tmp_path / "shared") != losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("anneal", "says"),
    [
        ({"on": "blocks[0]"}, "stages[0].anneal[0].on: nothing of what it means learns in this stage"),
        ({"on": "head", "part": [0.5, 0.5]}, "stages[0].anneal[0].part is [0.5, 0.5]; write [begin, end]"),
        ({"on": "heads"}, "stages[0].anneal[0].on"),
        ({"on": "head", "scale": 0}, "stages[0].anneal[0].scale is 0"),
    ],
)
def test_a_stage_s_own_rates_are_checked_before_training(recipe, tmp_path, anneal, says):
    with pytest.raises(UserError) as error:
        train(recipe(stages=[{"trainable": ["blocks[1]", "head"], "anneal": [anneal]}]), tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_recipe_in_the_folder_repeats_the_run(recipe, tmp_path):
    wanted = recipe(tokens=512 * 8, training_plan={"freezeout": {"t0": 0.5, "layer_lr": "scaled"}})
    train(wanted, tmp_path / "run")
    stored = recipes.read(tmp_path / "run" / "recipe.yaml")
    train(stored, tmp_path / "again")
    assert losses(tmp_path / "again") == losses(tmp_path / "run")
    with pytest.raises(UserError, match="gives both training_plan and stages"):
        train(stored.replaced(tokens=512 * 9), tmp_path / "other")


def test_the_command_takes_a_plan_and_names_mistakes(recipe, tmp_path, capsys):
    text = recipes.to_yaml(recipe(tokens=512 * 4))
    (tmp_path / "recipe.yaml").write_text(text)
    folder, path = str(tmp_path / "run"), str(tmp_path / "recipe.yaml")
    assert (
        main(["train", path, "training_plan={autofreeze: {looks: 2, tokens: 128}}", "--output", folder]) == 0
    )
    assert "layers by importance: " in capsys.readouterr().err
    assert len(json.loads((tmp_path / "run" / "result.json").read_text())["importance"]["layers"]) == 2
    for plan, says in (
        ("{lisa: {layers: 3}}", "layers is 3; the model has 2 layers"),
        ("{liza: {}}", "did you mean lisa?"),
        ("{importance_groups: {importance: {measure: skill}}}", "skill"),
        ("{lisa: {always: [blockz]}}", "blockz"),
        (
            "{importance_groups: {importance: {measure: gradient, tokens: 128}, groups: 2, always: [hed]}}",
            "hed",
        ),
        ("{autofreeze: {looks: 2, tokens: 128, always: [hed]}}", "hed"),
    ):
        assert main(["train", path, f"training_plan={plan}", "--output", str(tmp_path / "bad")]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1 and not (tmp_path / "bad").exists()


def shape_of(folder):
    from entasis.model.weights import read_shape

    return read_shape(folder)


def test_a_warm_up_longer_than_the_run_is_told_in_the_user_s_own_number(recipe, tmp_path):
    plan = {"freezeout": {"spend": "flops"}}
    wanted = recipe(tokens=512 * 10, training_plan=plan, schedule={"name": "constant", "warmup": 20})
    with pytest.raises(UserError, match=r"schedule.warmup is 20, more than the 10 steps"):
        train(wanted, tmp_path / "run")
