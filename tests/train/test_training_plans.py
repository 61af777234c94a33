"""Which layers a plan trains, and for how long."""

import json
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entasis.errors import UserError
from entasis.train import training_plans
from entasis.train.training_plans import allot, read, to_stages

NUMBERS = [0.1, 3.0, 0.2, 0.4, 2.0, 0.3]
PLANS = {
    "importance_groups": {"importance": NUMBERS},
    "growth_transformer": {
        "first_core": [2], "early": [0], "second_core": [4], "growth": [3, 4], "left_out": [5],
    },
    "lisa": {"importance": NUMBERS, "layers": 2, "every": "10%"},
    "freezeout": {},
}  # fmt: skip


def stages(name, *, steps=100, seed=0, n_layers=6, **options):
    plan = read({name: {**PLANS[name], **options}})
    return to_stages(plan, n_layers, steps, 512, seed)


def lengths(found):
    return [stage["tokens"] // 512 for stage in found]


def layers(stage):
    return json.loads(next(t for t in stage["trainable"] if t.startswith("blocks")).removeprefix("blocks"))


def test_every_plan_is_tried_here():
    assert set(PLANS) == set(training_plans.TRAINING_PLANS)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_a_plan_spends_every_step_and_keeps_the_moments(name, steps):
    found = stages(name, steps=steps)
    assert sum(lengths(found)) == steps and min(lengths(found)) > 0
    assert [s["optimizer_state"] for s in found] == ["reset"] + ["keep"] * (len(found) - 1)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 500))
def test_steps_are_allotted_within_one_of_their_share(parts, steps):
    found = allot([p / sum(parts) for p in parts], steps)
    assert sum(found) == steps
    for part, got in zip(parts, found, strict=True):
        assert abs(got - Fraction(part, sum(parts)) * steps) <= 1


def test_groups_follow_importance():
    found = stages("importance_groups", groups=3, final=0.4, spread=0.5)
    assert [layers(s) for s in found[:-1]] == [[1, 4], [3, 5], [0, 2]]
    assert found[-1]["trainable"] == "all" and lengths(found)[-1] == 40
    # Means of 1 - 0.5 … 1 + 0.5 over the groups, by hand.
    counts = [0.5 + (v - 0.1) / 2.9 for v in NUMBERS]
    means = [sum(counts[i] for i in g) / 2 for g in ([1, 4], [3, 5], [0, 2])]
    assert lengths(found)[:-1] == allot([0.6 * m / sum(means) for m in means] + [0.4], 100)[:-1]


def test_a_shuffled_control_has_the_same_lengths_in_other_places():
    plain, control = stages("importance_groups"), stages("importance_groups", shuffle=3)
    assert lengths(plain) == lengths(control)
    assert [s["trainable"] for s in plain] != [s["trainable"] for s in control]


def test_the_six_phases_of_growth_transformer_training():
    found = to_stages(read({"growth_transformer": {}}), 12, 120, 512, 0)
    assert lengths(found) == [30, 20, 20, 20, 15, 15]
    assert [layers(s) for s in found[:-1]] == [[4, 5], [1, 2], [8, 9], [7, 8, 9, 10], [0, 3, 6, 11]]
    assert found[4]["transition"] == {"scale": {"layers": [0, 3, 6, 11], "factor": 0.9}}
    assert found[-1]["trainable"] == "all"
    left_out = to_stages(read({"growth_transformer": {"left_out": [6]}}), 12, 120, 512, 0)
    assert layers(left_out[4]) == [0, 3, 11]


def test_lisa_draws_important_layers_more_often_and_each_once_a_period():
    found = stages("lisa", steps=4000, every=1, spread=0.9)
    drawn = Counter()
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


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("importance_groups", {"importance": [1.0]}, "importance has 1 numbers; the model has 6 layers"),
        ("importance_groups", {"importance": "no.json"}, "importance is 'no.json', which cannot be read"),
        ("importance_groups", {"importance": [1.0, "x"]}, "importance"),
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
