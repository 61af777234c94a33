"""Averaged weights: what they are, that training does not see them, and that a killed run goes on with them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from entasis import cli
from entasis.errors import Failure, UserError
from entasis.train.metrics import records
from entasis.train.recipe import to_yaml
from entasis.train.run import train

KEPT = {"every": 1, "keep_every": 1}


def of(folder):
    return load_file(folder / "model.safetensors")


def losses(folder):
    return [r["loss"] for r in records(folder)]


def after(folder, steps):
    """The weights after these steps."""
    return [of(folder / f"checkpoints/step-{step:08d}") for step in steps]


def test_the_saved_weights_are_the_exponential_average_of_the_trained_ones(recipe, tmp_path):
    train(recipe(checkpoint=KEPT), tmp_path / "plain")
    train(recipe(average={"ema": 0.75}), tmp_path / "run")
    expected, *rest = after(tmp_path / "plain", range(1, 9))
    for now in rest:
        expected = {name: 0.75 * x + 0.25 * now[name] for name, x in expected.items()}
    found = of(tmp_path / "run")
    assert all(torch.allclose(found[name], x, rtol=1e-5, atol=1e-7) for name, x in expected.items())
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    raw, plain = of(tmp_path / "run/raw"), of(tmp_path / "plain")
    assert all(torch.equal(raw[name], plain[name]) for name in plain)


def test_the_mean_of_the_last_ones_is_validated_and_saved(recipe, tmp_path, capsys):
    train(recipe(checkpoint=KEPT), tmp_path / "plain")
    whole = {"tokens": None}
    result = train(recipe(average={"last": 3, "every": 2}, evaluation=whole), tmp_path / "run")
    some = after(tmp_path / "plain", (4, 6, 8))
    found = of(tmp_path / "run")
    for name, x in found.items():
        assert torch.allclose(x, sum(w[name] for w in some) / 3, rtol=1e-5, atol=1e-7)
    # Whoever opens the folder gets what was validated.
    held_out = recipe().data.validation
    assert cli.main(["evaluate", str(tmp_path / "run"), "--text", held_out, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["text"]["bits_per_byte"] == pytest.approx(result["validation"]["bits_per_byte"], abs=1e-6)
    raw = cli.main(["evaluate", str(tmp_path / "run/raw"), "--text", held_out, "--json"])
    assert (
        raw == 0
        and json.loads(capsys.readouterr().out)["text"]["bits_per_byte"] != told["text"]["bits_per_byte"]
    )


@pytest.mark.parametrize("average", [{"ema": 0.75}, {"last": 3, "every": 2}])
def test_a_stopped_run_goes_on_with_its_average(recipe, tmp_path, average):
    wanted = recipe(average=average, checkpoint={"every": 1}, evaluation={"every": 3, "tokens": 2000})
    train(wanted, tmp_path / "whole")

    def stop(event):
        if event["event"] == "checkpoint" and event["step"] == 5:
            raise Failure("stopped")

    with pytest.raises(Failure):
        train(wanted, tmp_path / "stopped", reporter=stop)
    train(wanted, tmp_path / "stopped")
    for name in ("model.safetensors", "raw/model.safetensors", "raw/optimizer.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_is_extended_from_its_trained_weights(recipe, tmp_path):
    constant = {"name": "constant", "warmup": 0}
    train(recipe(tokens=512 * 8, schedule=constant), tmp_path / "long")
    train(recipe(tokens=512 * 5, schedule=constant, average={"ema": 0.9}), tmp_path / "first")
    keep = {"optimizer_state": "keep"}
    more = {"tokens": 512 * 3, "schedule": constant}
    with pytest.raises(UserError, match=r"a run with averaged weights in its raw/"):
        train(recipe(start={"from": str(tmp_path / "first"), **keep}, **more), tmp_path / "second")
    train(recipe(start={"from": str(tmp_path / "first/raw"), **keep}, **more), tmp_path / "second")
    assert losses(tmp_path / "second") == losses(tmp_path / "long")[5:]


def test_an_average_says_which(recipe, tmp_path):
    for average in ({}, {"ema": 0.9, "last": 3}):
        with pytest.raises(UserError, match="average takes one of ema"):
            train(recipe(average=average), tmp_path / "run")
    phase = {"tokens": 512, "trainable": "head", "lora": {"rank": 2}}
    with pytest.raises(UserError, match="an average, which would be of adapters' factors"):
        train(recipe(tokens=None, average={"ema": 0.9}, stages=[phase]), tmp_path / "run")


def test_the_model_writes_as_it_learns(recipe, tmp_path, capsys):
    wanted = recipe(samples={"every": 4, "prompts": ["def ", ""], "tokens": 5}, logging={"tensorboard": True})
    (tmp_path / "recipe.yaml").write_text(to_yaml(wanted))
    assert cli.main(["train", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")]) == 0
    rows = records(tmp_path / "run")
    written = {row["step"]: row["samples"] for row in rows if "samples" in row}
    assert list(written) == [4, 8] and all(texts[0].startswith("def ") for texts in written.values())
    assert written[4] != written[8] and all(len(texts) == 2 for texts in written.values())
    train(recipe(), tmp_path / "plain")
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert any((tmp_path / "run/tensorboard").iterdir())
    assert "step 8: 'def " in capsys.readouterr().err
