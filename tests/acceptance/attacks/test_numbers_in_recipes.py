"""Every number in a recipe has a range; what YAML can hide is refused. One line each, and no folder."""

import pytest

OUTSIDE = [
    "optimizer.clip=-1", "optimizer.clip=0", "optimizer.eps=-1", "optimizer.eps=0", "optimizer.lr=.nan",
    "optimizer.lr=.inf", "optimizer.lr=-1", "optimizer.betas=[2,3]", "optimizer.betas=[0.9,1]",
    "optimizer.weight_decay=.nan", "optimizer.weight_decay=-0.1", "optimizer.base_width=0",
    "schedule.floor=-1", "schedule.floor=2", "schedule.floor=.nan", "schedule.warmup=-1", "schedule.decay=1e400",
    "batch.micro=0", "batch.micro=-4", "batch.tokens=0", "data.sequence=0", "data.sequence=-32",
    "tokens=1e400", "tokens=1e300", "tokens=0", "tokens=-3", "seed=-1", "seed=1e30",
    "checkpoint.keep_every=-3", "checkpoint.keep_every=0", "checkpoint.keep_last=0", "checkpoint.every=0",
    "checkpoint.every=-2", "evaluation.every=0", "evaluation.tokens=0", "evaluation.tokens=1e400",
    "parallel.shard=0", "activation_memory=0", "activation_memory=-1",
    "activation_memory=99999999999999999999999GiB", "device=meta", "device=tpu", "device=cuda:-1",
    "stages=[{tokens: 0}]", "stages=[{tokens: 1280, schedule: {floor: 3}}]",
]  # fmt: skip
HIDDEN = [
    ("optimizer: {lr: 1e-3, lr: 1e-2}", "stands twice"),
    ("tokens: 5", "stands twice"),
    ("stages: &a [*a]", "refers to itself"),
    ("seed: " + "9" * 5000, "not usable YAML"),
    ("stages: " + "[" * 5000, "not usable YAML"),
]


@pytest.mark.parametrize("override", OUTSIDE)
def test_a_number_outside_its_range_is_refused(call, ground, tmp_path, override):
    answer = call("train", ground / "recipe.yaml", override, "--output", tmp_path / "run")
    answer.refused(override.partition("=")[0].replace("stages", "stages[0]").partition("[0][")[0])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "says"), HIDDEN)
def test_what_yaml_can_hide_is_refused(call, ground, tmp_path, text, says):
    (tmp_path / "recipe.yaml").write_text((ground / "recipe.yaml").read_text() + text + "\n")
    call("train", tmp_path / "recipe.yaml", "--output", tmp_path / "run").refused(says)
    (tmp_path / "study.yaml").write_text("base: {tokens: 5}\narms: {a: {}}\ntokens: 5\n" + text + "\n")
    call("study", "plan", tmp_path / "study.yaml").refused()
