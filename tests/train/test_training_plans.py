"""Which layers a plan trains, and for how long."""

import itertools
import json
import math
import pkgutil
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from entasis.errors import UserError
from entasis.grow import layer_importance
from entasis.registry import Registry
from entasis.shape import cost, selectors
from entasis.shape.shapes import LayerShape, ModelShape
from entasis.train import training_plans as package
from entasis.train.training_plans import plan as training_plans
from entasis.train.training_plans.plan import TRAINING_PLANS, Measurement, TrainingPlan, lay_out, read

ROOT = Path(__file__).parents[2]

NUMBERS = [0.1, 3.0, 0.2, 0.4, 2.0, 0.3]
PLANS = {
    "importance_groups": {"importance": NUMBERS},
    "growth_transformer": {
        "first_core": [2], "early": [0], "second_core": [4], "growth": [3, 4], "left_out": [5],
    },
    "lisa": {"importance": NUMBERS, "layers": 2, "every": "10%"},
    "freezeout": {},
    "autofreeze": {"looks": 3, "tokens": 64},
}  # fmt: skip
MEASURED = [NUMBERS, [0.1, 1.0, 0.2, 0.4, 1.0, 0.2], [0.1, 1.0, 0.2, 0.4, 3.0, 0.3]]
"""As many measurements as any of the plans makes."""


def shape_of(n_layers):
    return ModelShape(d_model=32, head_dim=8, vocabulary=64, layers=(LayerShape(4, 2, 64),) * n_layers)


def stages(name, *, steps=100, seed=0, n_layers=6, measured=MEASURED, **options):
    plan = read({name: {**PLANS.get(name, {}), **options}})
    measured = measured[: plan.measurements]
    return lay_out(
        plan, shape_of(n_layers), steps=steps, batch_tokens=512, sequence=64, seed=seed, measured=measured
    )


def lengths(found):
    return [stage["tokens"] // 512 for stage in found]


def layers(stage):
    return json.loads(next(t for t in stage["trainable"] if t.startswith("blocks")).removeprefix("blocks"))


def test_every_plan_is_tried_here():
    assert set(PLANS) == set(TRAINING_PLANS)


def test_every_file_of_the_folder_gives_a_plan():
    files = {module.name for module in pkgutil.iter_modules(package.__path__)} - {"plan"}
    assert {plan.__module__.rpartition(".")[2] for plan in TRAINING_PLANS.values()} == files


def table(page, header):
    """The cells of the rows below a header line."""
    below = page.partition(f"\n{header}\n")[2].splitlines()[1:]
    rows = itertools.takewhile(lambda line: line.startswith("|"), below)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def defaults(plan):
    return {
        name: None if field.is_required() else field.get_default(call_default_factory=True)
        for name, field in plan.model_fields.items()
    }


def own_defaults(plan):
    """Without what is so in every plan."""
    common = defaults(TrainingPlan)
    return {
        name: value for name, value in defaults(plan).items() if name not in common or common[name] != value
    }


def test_the_documented_table_is_the_registry():
    page = (ROOT / "docs" / "budgets.md").read_text(encoding="utf-8")
    rows = table(page, "| plan | rule | its options |")
    assert [row[0].strip("`") for row in rows] == list(TRAINING_PLANS)
    for name, rule, options in rows:
        plan = TRAINING_PLANS[name.strip("`")]
        assert rule == plan.__doc__.splitlines()[0]
        told = [yaml.safe_load(option) for option in re.findall(r"`(.+?)`", options)]
        required = [option for option in told if isinstance(option, str)]
        assert required == [option for option, field in plan.model_fields.items() if field.is_required()]
        found = {key: value for option in told if isinstance(option, dict) for key, value in option.items()}
        assert found | dict.fromkeys(required) == own_defaults(plan)
    for name, value in defaults(TrainingPlan).items():
        written = re.search(rf"two options more.*?`{name}: (.+?)`", page, re.DOTALL)
        assert written and yaml.safe_load(written[1]) == value
    named = [name for row in table(page, "| option | meaning |") for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted({name for plan in TRAINING_PLANS.values() for name in plan.model_fields})
    measured = re.search(r"`importance: (\{measure.*?\})`, which are the defaults", page)
    assert measured and yaml.safe_load(measured[1]) == Measurement().model_dump()


def test_the_example_of_a_plan_is_one(monkeypatch):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```diff\n(\+@TRAINING_PLANS.*?)```", text, re.DOTALL)
    monkeypatch.setattr(training_plans, "TRAINING_PLANS", Registry("training plan"))
    exec("".join(line[1:] for line in example.splitlines(keepends=True)), dict(vars(training_plans)))
    found = stages("top_first", n_layers=6, first=0.25)
    assert lengths(found) == [25, 75]
    assert layers(found[0]) == [3, 4, 5] and found[1]["trainable"] == "all"


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_a_plan_spends_every_step_and_keeps_the_moments(name, steps):
    found = stages(name, steps=steps)
    assert sum(lengths(found)) == steps and min(lengths(found)) > 0
    assert [s["optimizer_state"] for s in found] == ["reset"] + ["keep"] * (len(found) - 1)


def flops(found, n_layers=6):
    shape = shape_of(n_layers)
    return sum(
        stage["tokens"] * cost.stage_flops_per_token(shape, selectors.select(shape, stage["trainable"]), 64)
        for stage in found
    )


@pytest.mark.parametrize("name", PLANS)
@given(steps=st.integers(20, 400))
def test_at_equal_flops_a_plan_spends_what_training_everything_would(name, steps):
    plan = read({name: {**PLANS[name], "spend": "flops"}})
    found = stages(name, steps=steps, spend="flops")
    each = 512 * cost.flops_per_token(shape_of(6), 64)
    measured = plan.measurements * training_plans.measurement_flops(plan, shape_of(6), 64)
    assert flops(found) + measured == pytest.approx(steps * each, abs=0.51 * each)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("spend", ["tokens", "flops"])
def test_the_parts_of_the_schedule_join(name, spend):
    parts = [stage["schedule_part"] for stage in stages(name, spend=spend)]
    assert parts[0][0] == 0 and parts[-1][1] == pytest.approx(1, abs=0.01)
    assert all(a[1] == b[0] and a[0] < a[1] for a, b in itertools.pairwise(parts))


def test_backward_stops_below_the_lowest_layer_that_learns():
    """Without the embedding a plan of the top layers gets more tokens for the same FLOPs."""
    top = {"importance": [0, 0, 0, 0, 1, 1], "groups": 3, "final": 0, "spread": 0.9, "spend": "flops"}
    with_embedding = stages("importance_groups", **top)
    without = stages("importance_groups", **top, always=["final_norm", "head"])
    assert sum(lengths(without)) > 1.1 * sum(lengths(with_embedding)) > 1.1 * 100


def test_a_plan_that_measures_is_known_up_to_its_next_measurement():
    online = {"importance": {"measure": "skip", "after": 0.2}, "final": 0.4}
    first = stages("importance_groups", measured=[], **online)
    assert [s["trainable"] for s in first] == ["all"] and lengths(first) == [20]
    then = stages("importance_groups", **online)
    assert then[0] == first[0] and sum(lengths(then)) == 100
    assert [layers(s) for s in then[1:-1]] == [[1, 4], [3, 5], [0, 2]]


def test_mistakes_in_what_comes_after_a_measurement_are_named_before_it():
    with pytest.raises(UserError, match="groups is 9"):
        stages("importance_groups", importance={"after": 0.2}, groups=9, measured=[])


def test_autofreeze_freezes_from_the_bottom_what_has_settled():
    found = stages("autofreeze", steps=400, percentile=50)
    # Changes between the first two looks: 0, 2/3, 0, 0, 1/2, 1/3; the median is 1/6, so only layer 0 is frozen.
    # Between the second and the third, layers 1 to 5: 0, 0, 0, 2, 1/2; the median is 0, and nothing lies below it.
    assert [s["trainable"] if s["trainable"] == "all" else layers(s) for s in found] == [
        "all",
        "all",
        [1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5],
    ]
    settled = [[1.0] * 6, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [1.0, 1.1, 1.2, 1.3, 2.4, 2.5]]
    found = stages("autofreeze", measured=settled, percentile=99)
    assert [layers(s) for s in found[2:]] == [[5], [5]]


def test_measurements_that_eat_the_budget_are_refused():
    with pytest.raises(UserError, match="more than half of the run's FLOPs"):
        stages("autofreeze", spend="flops", steps=2, tokens=10_000)


def test_every_measure_that_a_plan_may_name_is_there():
    assert set(Measurement.model_fields["measure"].annotation.__args__) == set(layer_importance.MEASURES)


def test_groups_follow_importance():
    found = stages("importance_groups", groups=3, final=0.4, spread=0.5)
    assert [layers(s) for s in found[:-1]] == [[1, 4], [3, 5], [0, 2]]
    assert found[-1]["trainable"] == "all" and lengths(found)[-1] == 40
    # Means of 1 - 0.5 … 1 + 0.5 over the groups, by hand.
    counts = [0.5 + (v - 0.1) / 2.9 for v in NUMBERS]
    means = [sum(counts[i] for i in g) / 2 for g in ([1, 4], [3, 5], [0, 2])]
    for length, mean in zip(lengths(found)[:-1], means, strict=True):
        assert length == pytest.approx(60 * mean / sum(means), abs=1)


@pytest.mark.parametrize("name", ["importance_groups", "growth_transformer"])
def test_a_shuffled_control_is_shuffled_anew_for_every_seed(name):
    plans = [json.dumps(stages(name, shuffle=1, seed=seed)) for seed in range(8)]
    assert len(set(plans)) > 4 and plans[3] == json.dumps(stages(name, shuffle=1, seed=3))


def test_a_shuffled_control_has_the_same_lengths_in_other_places():
    plain, control = stages("importance_groups"), stages("importance_groups", shuffle=3)
    assert lengths(plain) == lengths(control)
    assert [s["trainable"] for s in plain] != [s["trainable"] for s in control]


def paper(**options):
    plan = read({"growth_transformer": options})
    return lay_out(plan, shape_of(12), steps=120, batch_tokens=512, sequence=64, seed=0)


def test_the_six_phases_of_growth_transformer_training():
    found = paper()
    assert lengths(found) == [30, 20, 20, 20, 15, 15]
    assert [layers(s) for s in found[:-1]] == [[4, 5], [1, 2], [8, 9], [7, 8, 9, 10], [0, 3, 6, 11]]
    assert found[4]["transition"] == {"scale": {"layers": [0, 3, 6, 11], "factor": 0.9}}
    assert found[-1]["trainable"] == "all"
    left_out = paper(left_out=[6, 8])
    assert [layers(s) for s in left_out[:-1]] == [[4, 5], [1, 2], [9], [7, 9, 10], [0, 3, 11]]
    assert lengths(left_out) == lengths(found)
    written = read({"growth_transformer": {"left_out": [6, 8]}}).model_dump()
    assert paper(**written) == left_out
    with pytest.raises(UserError, match="layer 3 is in redundant and in left_out"):
        paper(redundant=[0, 3], left_out=[3])


def test_a_phase_without_a_step_scales_its_layers_all_the_same():
    found = paper(epochs=[30, 20, 20, 20, 0.1, 30])
    assert lengths(found) == [30, 20, 20, 20, 30]
    assert [s["transition"] for s in found] == [None] * 4 + [
        {"scale": {"layers": [0, 3, 6, 11], "factor": 0.9}}
    ]


def test_lisa_draws_important_layers_more_often_and_each_once_a_period():
    found = stages("lisa", steps=4000, every=1, spread=0.9)
    drawn = Counter()
    assert len(found) == 4000
    for stage in found:
        assert len(set(layers(stage))) == 2
        drawn.update(dict.fromkeys(layers(stage), stage["tokens"] // 512))
    assert [layer for layer, _ in drawn.most_common(2)] == [1, 4]
    assert drawn[1] > 5 * drawn[0]
    assert stages("lisa", seed=1) != stages("lisa", seed=2) == stages("lisa", seed=2)


def test_freezeout_freezes_from_the_bottom_at_the_formulas_times():
    found = stages("freezeout", steps=1000, t0=0.5)
    starts = [0, *(sum(lengths(found)[: i + 1]) for i in range(len(found)))]
    for i, stage in enumerate(found[1:-1], start=1):
        assert layers(stage) == list(range(i, 6))
        assert starts[i] == pytest.approx(1000 * (0.5 + 0.5 * (i - 1) / 6) ** 3, abs=1)
    assert found[0]["trainable"] == "all" and found[-1]["trainable"] == ["final_norm", "head"]


def test_importance_comes_from_a_file(tmp_path):
    path = tmp_path / "importance.json"
    path.write_text(json.dumps({"quantity": "skip", "importance": NUMBERS}))
    assert stages("importance_groups", importance=str(path)) == stages("importance_groups")
    for wrong in ("high", math.nan, True, None):
        path.write_text(json.dumps({"importance": [0.5, wrong]}))
        with pytest.raises(
            UserError, match=r"importance\.json', whose importance\[1\] is .*must be a finite number"
        ):
            stages("importance_groups", importance=str(path))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("importance_groups", {"importance": [1.0]}, "importance has 1 numbers; the model has 6 layers"),
        ("importance_groups", {"importance": "no.json"}, "importance is 'no.json', which cannot be read"),
        ("importance_groups", {"importance": [1.0, "x"]}, "importance"),
        ("importance_groups", {"importance": {"measure": "fisher"}}, "measure is 'fisher'; it must be"),
        ("importance_groups", {"importance": {"tokens": 0}}, "importance: tokens is 0"),
        ("lisa", {"importance": None, "spread": 0.9}, "spread is of importance, and lisa was given none"),
        ("lisa", {"importance": None, "shuffle": 0}, "shuffle is of importance, and lisa was given none"),
        (
            "lisa",
            {"always": ["newest"], "spend": "flops"},
            "always has newest, whose cost is known to the run",
        ),
        ("importance_groups", {"groups": 9}, "groups is 9; the model has 6 layers"),
        ("growth_transformer", {"growth": [7]}, "there is no layer 7"),
        ("growth_transformer", {"epochs": [0, 0, 0, 0, 0, 0]}, "epochs are all 0"),
        ("growth_transformer", {"epochs": [1, 2]}, "epochs"),
        ("lisa", {"layers": 7}, "layers is 7; the model has 6 layers"),
        ("freezeout", {"t1": 0.5}, "unknown key t1; did you mean t0?"),
    ],
)
def test_mistakes_are_named(name, options, says):
    with pytest.raises(UserError) as error:
        stages(name, **options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_plan_is_named():
    with pytest.raises(UserError, match="did you mean freezeout"):
        read({"freeze_out": {}})
