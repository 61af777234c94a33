"""What comes after a run finds in its folder what it needs: growing it, starting from it, going on with it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from entasis.cli import main
from entasis.model import weights
from entasis.model.initialisation import draw
from entasis.train.run import train

EQUAL = [{"n_heads": 4, "n_kv_heads": 2, "d_ff": 64}] * 3
GROW = {"transition": {"grow": {"operator": "append_random", "count": 1}}, "tokens": 512}


@pytest.fixture
def growing(recipe):
    """A run of two steps that grows between them, drawn as no model is by default."""
    return recipe(
        shape={**recipe().shape, "layers": EQUAL},
        tokens=None,
        stages=[{"tokens": 512}, GROW],
        schedule={"name": "constant", "warmup": 0},
        init="nested",
        optimizer={"parametrisation": "mup", "base_width": 8},
        average={"ema": 0.9},
        checkpoint={"every": 1, "keep_every": 1},
    )


@pytest.fixture
def run(growing, tmp_path):
    train(growing, tmp_path / "run")
    return tmp_path / "run"


def grow(source, folder):
    assert main(["grow", str(source), str(folder), "--operator", "append_random", "count=1"]) == 0


def is_drawn_by_the_run(folder):
    """Whether the top layer of a model is drawn as the run draws."""
    shape = weights.read_shape(folder)
    name = f"blocks.{shape.n_layers - 1}.feedforward.up.weight"
    ((_, wanted),) = draw(shape, [name], 0, parametrisation="mup", base_width=8, nested=True)
    return torch.equal(load_file(folder / "model.safetensors")[name], wanted)


@pytest.mark.parametrize("part", [".", "raw", "checkpoints/step-00000002"])
def test_growths_of_a_run_draw_as_it_does_however_many_there_are(run, tmp_path, part):
    grow(run / part, tmp_path / "once")
    assert is_drawn_by_the_run(tmp_path / "once")
    grow(tmp_path / "once", tmp_path / "twice")
    assert is_drawn_by_the_run(tmp_path / "twice")
    # Earlier versions did not say it.
    told = json.loads((tmp_path / "once" / "provenance.json").read_text())
    assert told["init"] == {"parametrisation": "mup", "base_width": 8, "nested": True}
    del told["init"]
    (tmp_path / "once" / "provenance.json").write_text(json.dumps(told))
    grow(tmp_path / "once", tmp_path / "earlier")
    assert not is_drawn_by_the_run(tmp_path / "earlier")


def test_a_run_of_an_earlier_version_grows(run, tmp_path):
    text = (run / "recipe.yaml").read_text()
    earlier = text.replace("max_grad_norm:", "clip:").replace("min_lr_factor:", "floor:")
    assert earlier != text
    (run / "recipe.yaml").write_text(earlier)
    grow(run, tmp_path / "grown")
    assert is_drawn_by_the_run(tmp_path / "grown")


def test_a_checkpoint_is_the_run_s_by_whatever_path(run, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(run / "checkpoints")
    grow("step-00000002", tmp_path / "grown")
    assert (tmp_path / "grown/tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    assert is_drawn_by_the_run(tmp_path / "grown")
    result = train(recipe(shape=None, tokens=512, start={"from": "step-00000002"}), tmp_path / "more")
    assert len(result["layers"]) == 4


def test_the_loss_of_a_kept_checkpoint_is_measured(run, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("some words and some more words\n" * 60)
    words = ["--operator", "llama_pro", "--after", "0", "--text", str(text), "--tokens", "500", "--json"]
    assert main(["grow", str(run / "checkpoints/step-00000002"), str(tmp_path / "grown"), *words]) == 0
    losses = json.loads(capsys.readouterr().out)["loss"]
    # Both cut the one document.
    assert losses["before"]["tokens"] == losses["after"]["tokens"] <= 500
    assert losses["before"]["nats_per_token"] == pytest.approx(losses["after"]["nats_per_token"], rel=1e-5)


def test_a_run_that_grew_and_was_killed_at_its_end_is_not_damaged(growing, run):
    result = json.loads((run / "result.json").read_text())
    shape = (run / "shape.json").read_bytes()
    (run / "result.json").unlink()
    notes = []

    def look(event):
        if event["event"] == "start":
            notes.extend(event["notes"])
            assert (run / "shape.json").read_bytes() == shape

    assert train(growing, run, reporter=look)["validation"] == result["validation"]
    assert not [text for text in notes if "damaged" in text]
    # What is no shape of the run is.
    (run / "result.json").unlink()
    (run / "shape.json").write_bytes(shape[:-9])
    train(growing, run, reporter=lambda e: notes.extend(e.get("notes", ())))
    assert [text for text in notes if "damaged" in text] == [
        f"damaged: {run / 'shape.json'}; it is made again"
    ]
    assert (run / "shape.json").read_bytes() == shape
