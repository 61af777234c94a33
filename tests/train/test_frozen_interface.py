"""Runs on a frozen interface: the table stays, comes along in the weights, and goes out as an ordinary one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from entasis.cli import main
from entasis.data import glyphs
from entasis.data.tokenizer import from_bytes
from entasis.data.tokenizer import train as train_tokenizer
from entasis.errors import UserError
from entasis.evaluate.loading import load
from entasis.model.weights import read_shape
from entasis.shape import ModelShape, layout
from entasis.shape.interfaces import Glyph
from entasis.train import run as loop
from entasis.train.auto_settings import settings_of, simplest
from entasis.train.resolve import resolve
from entasis.train.stages import lay_out
from entasis.train.step_timing import Step

GLYPH = {"kind": "glyph", "font": "pillow", "pixels": 12}
CODED = {"kind": "binary", "stored": True}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def with_interface(recipe, interface, **changes):
    return recipe(shape={**recipe().shape, "interface": interface}, **changes)


@pytest.mark.parametrize("interface", [GLYPH, CODED, {"kind": "affine_binary"}, {"kind": "random"}], ids=str)
def test_a_run_leaves_the_table_and_every_format_can_hold_it(recipe, tmp_path, interface, capsys):
    first = loop.train(with_interface(recipe, interface, tokens=512), tmp_path / "short")
    result = loop.train(with_interface(recipe, interface), tmp_path / "run")
    assert result["loss"] < first["loss"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("short", "run"))
    learned = {name for name in before if not torch.equal(before[name], after[name])}
    assert learned == {name for name in before if not name.startswith("embedding.")}
    moments = load_file(tmp_path / "run" / "optimizer.safetensors")
    assert not [key for key in moments if "embedding" in key]

    loaded = load(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--to", "hf", "--output", str(tmp_path / "hf")]) == 0
    exported = load(tmp_path / "hf")
    assert exported.shape.interface.learns
    ids = list(range(0, 250, 5))
    torch.testing.assert_close(exported.logits(ids), loaded.logits(ids), rtol=1e-5, atol=1e-5)
    assert loaded.generate([1, 2, 3], tokens=3, temperature=0)


def test_a_step_is_timed_before_the_corpus_that_glyphs_are_drawn_for_is_there(recipe):
    wanted = with_interface(recipe, GLYPH, data={"train": "not/yet/there", "sequence": 32})
    resolved, shape, _ = resolve(wanted, 257)
    device = torch.device("cpu")
    step = Step(simplest(resolved, device), lay_out(resolved, shape)[0], device)
    assert step(settings_of(step.recipe)).micro > 0


def test_a_glyph_run_says_what_it_drew_and_goes_on_without_the_font(recipe, tmp_path, monkeypatch):
    whole = loop.train(with_interface(recipe, GLYPH, checkpoint={"every": 4}), tmp_path / "whole")
    told = json.loads((tmp_path / "whole" / "environment.json").read_text())["interface"]
    shape = json.loads((tmp_path / "whole" / "shape.json").read_text())
    assert told["bitmaps"] == shape["interface"]["bitmaps"] and told["tokens"] == 257
    assert told["distinct"] < 257  # NUL is drawn as the text \\x00 is, and so are others

    def stop(event):
        if event["event"] == "checkpoint" and event["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(
            with_interface(recipe, GLYPH, checkpoint={"every": 4}), tmp_path / "stopped", reporter=stop
        )

    def no_font(interface):
        raise AssertionError("nothing may be drawn any more")

    monkeypatch.setattr(glyphs, "_font", no_font)
    resumed = loop.train(with_interface(recipe, GLYPH, checkpoint={"every": 4}), tmp_path / "stopped")
    assert resumed["loss"] == whole["loss"]


def test_drawings_that_differ_are_refused(recipe, tmp_path):
    other = {**GLYPH, "bitmaps": "0" * 32}
    with pytest.raises(UserError, match="draws this tokenizer's tokens otherwise here"):
        loop.train(with_interface(recipe, other), tmp_path / "run")
    with pytest.raises(UserError, match=r"font nowhere\.ttf cannot be read"):
        loop.train(with_interface(recipe, {**GLYPH, "font": "nowhere.ttf"}), tmp_path / "run")


def test_every_kind_of_token_is_written_so_that_one_sees_it():
    plain = from_bytes()
    assert [glyphs.text_of(plain, i) for i in (10, 32, 65, 0xE2, 256, 999)] == [
        "\\n", " ", "A", "\\xe2", "<|endoftext|>", "",
    ]  # fmt: skip
    merged = train_tokenizer(["über über über"] * 9, 260)
    texts = {glyphs.text_of(merged, i) for i in range(257, 260)}
    assert any("ü" in text for text in texts)


def test_collisions_are_counted(tmp_path, recipe):
    """Pillow's Latin font has one box for every character that it lacks."""
    from_bytes().save(tmp_path / "tokenizer.json")
    drawn = glyphs.bitmaps(Glyph(font="pillow", pixels=16), 257, tmp_path / "tokenizer.json")
    shape = with_interface(recipe, {"kind": "glyph", "font": "pillow", "pixels": 16}).shape
    model = ModelShape.from_dict({**shape, "norm": "layernorm"})
    seen = glyphs.insight(model.interface, model, tmp_path / "tokenizer.json")
    assert seen.distinct == len({row.tobytes() for row in drawn})
    assert seen.rank == 32 and seen.distinct_after_norm <= seen.distinct
    table = glyphs.table(model.interface, model, tmp_path / "tokenizer.json")
    assert abs((table**2).sum(1) - 1).max() < 1e-5


def test_a_training_plan_leaves_a_frozen_table_alone(recipe):
    written = with_interface(recipe, {"kind": "random"}, training_plan={"lisa": {"layers": 1}})
    resolved, shape, _ = resolve(written, 257)
    names = {name for span in lay_out(resolved, shape) for name in span.trainable}
    assert names == set(layout.learnable(shape))


def test_a_run_may_start_from_glyphs_whose_drawings_its_recipe_does_not_know_yet(recipe, tmp_path):
    """As a study writes it before the trunk is trained."""
    wanted = with_interface(recipe, GLYPH, tokens=512)
    loop.train(wanted, tmp_path / "trunk")
    again = with_interface(recipe, GLYPH, tokens=512, start={"from": str(tmp_path / "trunk")})
    loop.train(again, tmp_path / "run")
    drawn = [read_shape(tmp_path / name).interface.bitmaps for name in ("trunk", "run")]
    assert drawn[0] == drawn[1] is not None
    other = {**GLYPH, "bitmaps": "0" * 64}
    with pytest.raises(UserError, match="shape is another than that of"):
        resolve(again.replaced(shape={**again.shape, "interface": other}), 257)
