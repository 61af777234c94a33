import json
import time

import pytest
import torch

from entasis.cli import main
from entasis.errors import UserError
from entasis.model.block import Block
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape import cost, layout
from entasis.shape.specification import resolve
from entasis.train import recipe as recipes
from entasis.train.bench import bench
from entasis.train.part_timing import Walk


def test_figures_agree_with_one_another_and_nothing_is_left_behind(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    told = []
    measured = recipe(tokens="1M")
    figures = bench(measured, steps=3, repeats=1, reporter=lambda *event: told.append(event))
    assert not list(tmp_path.glob("entasis*"))
    assert not (tmp_path / "runs").exists()
    shape = resolve(measured.shape).shape
    assert figures.parameters == cost.parameters(shape)
    names = ["embedding", "layer 0", "layer 1", "head and loss", "optimizer"]
    assert [part.name for part in figures.parts] == names
    assert sum(part.time for part in figures.parts) == pytest.approx(1)
    assert sum(part.flops for part in figures.parts) == pytest.approx(1)
    by_name = {part.name: part for part in figures.parts}
    expected = cost.layer_flops_per_token(shape, 1, 64) / cost.flops_per_token(shape, 64)
    assert by_name["layer 1"].flops == pytest.approx(expected)
    assert all(part.backward > 0 for part in figures.parts[:-1])
    step = figures.step_seconds
    assert step.fastest <= step.median <= step.slowest
    assert figures.tokens_per_second == pytest.approx(512 / step.median)
    done = figures.tokens_per_second * figures.flops_per_token
    assert figures.mfu == pytest.approx(done / figures.matmul_flops_per_second)
    assert 0 <= figures.data_wait < 1
    assert figures.first_step_seconds.compiled is None
    # Whatever the recipe's length, five steps warm up and three are timed.
    assert [event for event in told if event[0] == "steps"][-1] == ("steps", 8, 8)


@pytest.mark.parametrize("tied", [False, True])
def test_timing_part_by_part_does_the_work_of_a_step(recipe, tied):
    """The gradients of the walk through the parts are those of the whole model."""
    shape = resolve({**recipe().shape, "tied_embeddings": tied}).shape
    model = Transformer(shape)
    init_weights(model, 0)
    rows = torch.randint(shape.vocabulary, (3, 33), generator=torch.Generator().manual_seed(0))
    tokens_BT, targets_BT = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    ids_BT = torch.arange(32).div(10, rounding_mode="floor").expand(3, 32)
    (model.loss(tokens_BT, targets_BT, document_ids_BT=ids_BT) / tokens_BT.numel()).backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    walk = Walk(model, tokens_BT, targets_BT, ids_BT, bf16=False)
    walk.through(lambda: None)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-5, atol=1e-7, msg=name)


def test_a_planted_slow_layer_has_the_largest_share(recipe, monkeypatch):
    forward = Block._layer

    def dawdle(self, *args):
        if self.index == 0:
            time.sleep(0.2)
        return forward(self, *args)

    monkeypatch.setattr(Block, "_layer", dawdle)
    parts = bench(recipe(), steps=1, repeats=1).parts
    slowest = max(parts, key=lambda part: part.time)
    assert slowest.name == "layer 0" and slowest.forward > slowest.backward
    assert slowest.time > 0.5 > slowest.flops


def test_command_gives_json_and_a_table_for_people(recipe, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.to_yaml(recipe()))
    assert main(["bench", "--json", "batch.tokens=256", str(path), "--steps", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["batch_tokens"] == 256
    assert main(["bench", str(path), "--steps=1"]) == 0
    told = capsys.readouterr().out
    assert "tokens/s" in told
    assert "head and loss" in told


def test_only_some_parameters_learn(recipe):
    """What is frozen takes no time in the backward pass where nothing below it learns."""
    source = recipe().model_dump()
    source["stages"] = [{"trainable": ["blocks.1.*", "norm.*", "head.*"], "tokens": 4096}]
    parts = bench(recipes.from_dict(source), steps=1, repeats=1).parts
    assert {p.name: p.backward > 0 for p in parts} == {
        "embedding": False, "layer 0": False, "layer 1": True, "head and loss": True, "optimizer": False
    }  # fmt: skip


@pytest.mark.parametrize("whose", ["stages", "training_plan"])
def test_the_figures_are_of_what_the_first_stage_trains(recipe, whose):
    source = recipe(tokens=512 * 40).model_dump()
    learns = ["final_norm", "head"]
    if whose == "stages":
        source["stages"] = [
            {"trainable": learns, "tokens": 256 * 20, "batch": {"tokens": 256}, "sequence": 32},
            {},
        ]
    else:
        numbers = {"importance": [0.1, 0.9], "groups": 2, "always": learns}
        source["training_plan"] = {"importance_groups": numbers}
    figures = bench(recipes.from_dict(source), steps=1, repeats=1)
    shape = resolve(recipe().shape).shape
    names = [p.name for p in layout.parameters(shape) if p.part in learns]
    if whose == "training_plan":
        names += [p.name for p in layout.parameters(shape) if p.layer == 1]
    assert figures.batch_tokens == (256 if whose == "stages" else 512)
    flops = cost.stage_flops_per_token(shape, names, figures.sequence)
    assert figures.flops_per_token == flops < cost.flops_per_token(shape, figures.sequence)
    done = figures.tokens_per_second * flops / figures.matmul_flops_per_second
    assert figures.mfu == pytest.approx(done)
    assert figures.seconds_at_the_ceiling == figures.batch_tokens * flops / figures.matmul_flops_per_second
    counts = cost.count_uses(shape, names)
    assert figures.state_bytes == 4 * counts.stored + 12 * counts.active
    share = {part.name: part.flops * flops for part in figures.parts}
    forward = [cost.layer_flops_per_token(shape, i, figures.sequence, training=False) for i in range(2)]
    head = 2 * shape.d_model * shape.vocabulary
    assert share["layer 0"] == pytest.approx(forward[0]) and share["head and loss"] == pytest.approx(3 * head)
    assert sum(share.values()) == pytest.approx(flops)
    if whose == "stages":
        assert share["layer 1"] == pytest.approx(forward[1])


def test_mistakes_are_told(recipe, monkeypatch):
    with pytest.raises(UserError, match="--steps is 0"):
        bench(recipe(), steps=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        bench(recipe())
