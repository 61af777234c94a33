"""Arms with a training plan: equal cost, as their plans spend it."""

import pytest

from entasis.errors import UserError
from entasis.study import plan, study_files
from entasis.study.arms import Findings


def laid_out(**changes):
    study = study_files.read("budgets", overrides=[f"{key}={value}" for key, value in changes.items()])
    arms = plan.solve(study, 1024)
    return plan.lay_out(study, arms, Findings(multiplier=dict.fromkeys(arms, 1.0)))


def test_every_shipped_plan_costs_what_the_baseline_does():
    grid = laid_out().grid["flops"]
    del grid["half"]  # the control, exempt from equal cost
    base = grid["uniform"][0].flops
    assert {name: runs[0].flops for name, runs in grid.items()} == pytest.approx(
        dict.fromkeys(grid, base), rel=0.01
    )
    # What goes into the recipe is what the plan goes by, not the tokens that it turns into.
    freezeout = grid["freezeout"][0]
    assert freezeout.tokens > 1.5 * grid["uniform"][0].tokens
    assert freezeout.recipe["tokens"] == grid["uniform"][0].tokens


def test_a_plan_of_another_shape_gets_the_same_budget():
    grid = laid_out(
        **{"arms.freezeout": '{"shape.layers": 8, training_plan: {freezeout: {spend: flops}}}'}
    ).grid
    runs = {name: grid["flops"][name][0] for name in ("uniform", "freezeout")}
    assert runs["freezeout"].flops == pytest.approx(runs["uniform"].flops, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"protocols": "[params]"}, "arm groups"),
        ({"protocols": "[time]"}, "use params or flops"),
        (
            {"arms.lisa": "{training_plan: {lisa: {layers: 40}}}"},
            "arm lisa: recipe: training_plan: layers is 40",
        ),
    ],
)
def test_what_cannot_be_matched_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        laid_out(**changes)
