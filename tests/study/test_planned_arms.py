"""Arms with a training plan: equal cost, as their plans spend it."""

import contextlib
import io
import json
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from entasis.errors import UserError
from entasis.study import analysis, cost_estimate, machine, plan, runner, study_files, throughput
from entasis.study.arms import Findings
from entasis.study.executors import launchers
from entasis.train import stages, step_timing
from entasis.train.candidates import Measured, Settings

TIMED = "{uniform: {}, freezeout: {training_plan: {freezeout: {spend: flops}}}, lisa: {training_plan: {lisa: {layers: 4, always: [embedding, head], every: 25%}}}}"
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
            {"arms.lisa": "{training_plan: {autofreeze: {}}}"},
            "arm lisa: its training plan measures or draws .* write spend: flops",
        ),
        ({"arms.groups": "{training_plan: {importance_groups: {importance: {measure: skip}}}}"}, "arm groups: its"),
        ({"arms.lisa": "{training_plan: {lisa: {always: [final_norm, head]}}}"}, "arm lisa: its training plan"),
        ({"arms.growth-transformer": "{training_plan: {growth_transformer: {shuffle: 1, always: [head]}}}"}, "arm growth-transformer"),
        ({"arms.uniform": "{training_plan: {autofreeze: {}}}"}, "arm uniform: its training plan"),
        (
            {
                "arms": "{uniform: {}, a: {start: {from: {trunk: t}}, shape: null}}",
                "trunks": "{t: {tokens: 100k, training_plan: {autofreeze: {tokens: 128}}}}",
            },
            "trunk t: its training plan",
        ),
        (
            {"arms.lisa": "{training_plan: {lisa: {layers: 40}}}"},
            "arm lisa: recipe: training_plan: layers is 40",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_matched_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        laid_out(**changes)


def test_a_plan_that_is_known_beforehand_and_a_trunk_that_all_share_may_spend_tokens():
    laid_out(**{"arms.lisa": "{training_plan: {lisa: {}}}"})  # draws layers of one price
    grid = laid_out(**{"arms.freezeout": "{training_plan: {freezeout: {}}}"}).grid["flops"]
    assert grid["freezeout"][0].flops == pytest.approx(grid["uniform"][0].flops, rel=0.01)
    laid_out(
        arms="{uniform: {}, slow: {optimizer.lr: 1e-3}}",
        trunks="{t: {tokens: 100k, training_plan: {autofreeze: {tokens: 128}}}}",
        **{"base.start": "{from: {trunk: t}}"},
    )


def test_numbers_that_a_plan_is_given_are_noted():
    numbers = f"{{training_plan: {{lisa: {{spend: flops, importance: {list(range(12))}}}}}}}"
    arms = plan.solve(read(**{"arms.lisa": numbers}), 1024)
    assert "its importance is given, whose cost is not counted" in arms["lisa"].notes
    assert not [arms[name].notes for name in ("groups", "freezeout", "uniform") if arms[name].notes]


def test_the_flops_of_a_verdict_are_those_that_the_runs_took(tmp_path: Path):
    """Planted: runs that froze layers, and so took less than if they had not."""
    study = read(
        arms="{uniform: {}, freezes: {training_plan: {autofreeze: {}}}}",
        protocols="[unmatched]", sweep="null", seeds=2,
    )  # fmt: skip
    laid = plan.lay_out(study, plan.solve(study, 1024), Findings())
    for run in laid.runs:
        freezes = run.arm == "freezes"
        result = {
            "tokens": 1000, "flops_per_token": 70 + run.seed if freezes else 100, "loss": 1.0, "seconds": 1.0,
            "tokens_per_second": 1.0, "peak_memory_bytes": 1,
            "validation": {"bits_per_byte": 1.0, "tokens": 8, "bytes": 8},
        } | ({"importance": {"flops": 5000.0}} if freezes else {})  # fmt: skip
        (tmp_path / run.folder).mkdir(parents=True)
        (tmp_path / run.folder / "result.json").write_text(json.dumps(result))
        arrays = {"document_nll": np.full(2, 4 * np.log(2)), "document_bytes": np.full(2, 4)}
        save_file(arrays, tmp_path / run.folder / "validation.safetensors")
    arms = analysis.judge(study, laid, tmp_path).protocols["unmatched"].arms
    assert arms["uniform"].training_flops == 100_000
    assert (arms["freezes"].training_flops, arms["freezes"].flops_per_token) == (75_500, 75)


@pytest.mark.parametrize("spend", ["tokens", "flops"])
def test_equal_time_is_refused_where_seeds_differ_in_cost(spend):
    lisa = f"{{training_plan: {{lisa: {{layers: 1, spend: {spend}, always: [final_norm, head]}}}}}}"
    study = read(protocols="[time]", arms=f"{{uniform: {{}}, lisa: {lisa}}}", sweep="null")
    with pytest.raises(
        UserError, match="arm lisa: its training plan draws layers so that seeds differ in cost"
    ):
        plan.solve(study, 1024)


def test_a_prediction_is_by_the_stage_that_was_timed(monkeypatch, tmp_path: Path):
    """Planted: a step of each job takes a picosecond for each FLOP of the costliest stage of its first arm."""
    study = read(
        arms="""{uniform: {}, freezeout: {training_plan: {freezeout: {}}},
            grown: {shape.layers: 6, stages: [{tokens: 25%, batch: {tokens: 2048}}, {transition: {grow: {operator: stack, times: 2}}}]},
            top: {stages: [{tokens: 50%, trainable: [final_norm, head]}, {}]}}""",
        sweep="null",
        **{"base.precision": "fp32", "base.attention": "sdpa", "base.compile": "false"},
    )
    arms = plan.solve(study, 1024)
    jobs = machine.jobs_of(arms)
    assert ("uniform", "freezeout") in jobs and len(jobs) == 3
    settings = Settings("fp32", "sdpa", False)

    def told(names):
        timed = stages.costliest(arms[names[0]].stages)
        seconds = 1e-12 * timed.batch_tokens * timed.flops_per_token
        return Measured(settings=settings, fastest=seconds, median=seconds, compilation=0.0, rounds=3).plain()

    answer = {
        "device": "cpu",
        "flops_per_second": 1.0,
        "jobs": [
            {"timings": [told(names)], "simplest": settings, "precision_open": False, "steps": 1, "runs": 1}
            for names in jobs
        ],
    }
    monkeypatch.setattr(
        launchers, "call", lambda pool, what, *_, **__: [["a place"]] if what == "counting" else [answer]
    )
    monkeypatch.setattr(cost_estimate.local, "pool_of", lambda places: contextlib.nullcontext())
    laid = plan.lay_out(study, arms, Findings())
    speeds, *_ = cost_estimate._speeds(study, tmp_path, laid, quick=False)
    assert speeds == pytest.approx(dict.fromkeys(arms, 1e-12), rel=1e-9, abs=0)


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
