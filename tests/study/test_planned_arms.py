"""Arms with a training plan: equal cost, as their plans spend it."""

import io
import json
import shutil
import sysconfig
from pathlib import Path

import pytest
from rich.console import Console

from entasis.errors import UserError
from entasis.study import plan, runner, study_files, throughput
from entasis.study.arms import Findings
from entasis.train import step_timing

TIMED = "{uniform: {}, freezeout: {training_plan: {freezeout: {spend: flops}}}, lisa: {training_plan: {lisa: {layers: 4, always: [head], every: 25%}}}}"
"""Arms whose plans are known before they are trained."""


def read(**changes):
    if "arms" in changes:  # of which the shipped contrasts know nothing
        changes = {"contrasts": "{}", **changes}
    return study_files.read("budgets", overrides=[f"{key}={value}" for key, value in changes.items()])


def laid_out(findings=None, **changes):
    study = read(**changes)
    arms = plan.solve(study, 1024)
    return plan.lay_out(study, arms, findings or Findings(multiplier=dict.fromkeys(arms, 1.0)))


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
        ({"protocols": "[time]"}, "arm groups: its training plan goes by what it measures as it trains"),
        (
            {"protocols": "[time]", "arms": "{uniform: {}, a: {training_plan: {autofreeze: {}}}}"},
            "arm a: its training plan goes by what it measures",
        ),
        (
            {"arms.lisa": "{training_plan: {lisa: {layers: 40}}}"},
            "arm lisa: recipe: training_plan: layers is 40",
        ),
    ],
)
def test_what_cannot_be_matched_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        laid_out(**changes)


def test_equal_time_is_by_the_speed_of_a_plan_s_mixed_stages(monkeypatch):
    """Planted: a token takes a microsecond, and one more for each layer that learns."""

    def planted(self, settings):
        layers = {name.split(".")[1] for name in self.span.trainable if name.startswith("blocks")}
        return step_timing.Seconds(self.tokens_BT.numel() * (1 + len(layers)) * 1e-6, 0.0)

    monkeypatch.setattr(step_timing.Step, "__call__", planted)
    fixed = {"base.precision": "fp32", "base.attention": "sdpa", "base.compile": "false"}
    study = read(protocols="[time]", arms=TIMED, sweep="null", **fixed)
    arms = plan.solve(study, 1024)
    steps, mixes = throughput.steps_of(arms)
    assert [len(mix) for mix in mixes.values()][:2] == [1, len(arms["freezeout"].stages)]
    measured = throughput.in_turn(steps, "cpu")
    speeds = {name: throughput.mixed(measured, mix) for name, mix in mixes.items()}
    assert {len(rounds) for rounds in speeds.values()} == {throughput.ROUNDS}
    assert speeds["uniform"][0] == pytest.approx(1e6 / 13) and speeds["lisa"][0] == pytest.approx(1e6 / 5)
    grid = plan.lay_out(
        study, arms, Findings(tokens_per_second={name: rounds[0] for name, rounds in speeds.items()})
    ).grid["time"]

    def seconds(run):
        """Of the run as it will be, stage by stage."""
        (arm,) = plan.solve(study.replaced(base=run.recipe, arms={"a": {}}, baseline="a"), 1024).values()
        layers = [sum(n.endswith("attention_norm.weight") for n in s.trainable) for s in arm.stages]
        return sum(s.steps * s.batch_tokens * (1 + n) * 1e-6 for s, n in zip(arm.stages, layers, strict=True))

    base = seconds(grid["uniform"][0])
    for name, runs in grid.items():
        assert seconds(runs[0]) == pytest.approx(base, rel=0.01), name
    assert grid["lisa"][0].tokens == pytest.approx(13 / 5 * grid["uniform"][0].tokens, rel=0.01)


@pytest.mark.slow
@pytest.mark.xdist_group("study")
def test_a_study_of_plans_at_equal_time(tmp_path: Path):
    (tmp_path / "text").mkdir()
    for name in ("argparse", "ast", "difflib", "inspect", "tarfile"):
        shutil.copy(Path(sysconfig.get_paths()["stdlib"], f"{name}.py"), tmp_path / "text")
    study = read(
        protocols="[time]",
        arms=TIMED,
        sweep="null",
        seeds=1,
        **{
            "base.shape.budget": "130k", "base.shape.d_model": 32, "base.shape.head_dim": 8, "base.shape.layers": 4,
            "base.shape.context": 32, "base.data.sequence": 32, "base.shape.vocabulary": 512, "base.tokens": 8192,
            "base.batch.tokens": 256, "base.evaluation.tokens": 4000, "base.precision": "fp32",
            "base.attention": "sdpa", "base.compile": "false", "base.logging.tensorboard": "false",
            "corpora.prose": f"{{sources: [{tmp_path / 'text'}], train_tokenizer: 512, validation: 30%}}",
        },
    )  # fmt: skip
    folder = tmp_path / "s"
    verdict = runner.run(study, folder, Console(file=io.StringIO(), width=160))
    assert verdict.complete, verdict
    speeds = throughput.speeds(folder)
    for name, arm in verdict.protocols["time"].arms.items():
        wanted = 8192 * speeds[name] / speeds["uniform"]
        done = json.loads((folder / f"runs/{name}/seed-0/result.json").read_text())
        assert done["tokens"] == pytest.approx(wanted, abs=256 * max(1, len(done.get("stages", [])))), name
        assert arm.throughput.relative_error >= 0
