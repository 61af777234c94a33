"""`entasis.anatomy.dissect` and the command: frames, folders, mistakes, the page, suggestions."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
import browser
from small_models import SEQUENCE, sentences, untrained

from entasis import cli
from entasis.anatomy import dissect, suggest
from entasis.anatomy.measures import load_measures
from entasis.anatomy.runner import COLUMNS
from entasis.errors import UserError
from entasis.model import weights
from entasis.shape import LayerShape, cost, specification
from entasis.train import recipe as recipes
from entasis.train.recipe import Data
from entasis.train.resolve import resolve

TEXTS = sentences(30, 11)


@pytest.fixture
def folder(trained, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    weights.save(trained.model, path)
    trained.tokenizer.save(path / "tokenizer.json")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return path


def test_a_tidy_frame(trained) -> None:
    frame = dissect(trained, TEXTS, measures=["skip", "spectrum"], sequence=SEQUENCE)
    assert list(frame.columns) == COLUMNS
    assert set(frame["measure"]) == {"loss", "skip", "spectrum"}
    skip = frame[frame["quantity"] == "skip"]
    assert skip["layer"].tolist() == list(range(5))
    assert (skip["low"] <= skip["value"]).all() and (skip["value"] <= skip["high"]).all()
    rms = frame[frame["quantity"] == "weight_rms"]
    assert len(rms) == 5 * 7 and rms["p"].isna().all()
    again = dissect(trained, TEXTS, measures=["skip", "spectrum"], sequence=SEQUENCE)
    assert frame.equals(again)


def test_every_measure_says_what_it_gives() -> None:
    page = (Path(__file__).parents[2] / "docs" / "anatomy.md").read_text(encoding="utf-8")
    for m in load_measures().values():
        assert f"`{m.name}`" in page
        assert m.gives and all(len(text) > 10 for text in m.gives.values())
        assert m.kind in {"loss", "structure", "ablation", "manipulation", "predictability", "recovery"}


def test_done_measures_are_not_done_again(trained, tmp_path: Path) -> None:
    first = dissect(trained, TEXTS, measures=["skip"], sequence=SEQUENCE, output=tmp_path / "a")
    asked: list[str] = []
    more = dissect(
        trained, TEXTS, measures=["skip", "stream"], sequence=SEQUENCE, output=tmp_path / "a",
        progress=lambda name, done, total: asked.append(name),
    )  # fmt: skip
    assert set(asked) == {"stream"}
    assert (
        more[more["measure"] == "skip"]
        .reset_index(drop=True)
        .equals(first[first["measure"] == "skip"].reset_index(drop=True))
    )


def test_a_folder_of_another_dissection_is_refused(trained, tmp_path: Path) -> None:
    dissect(trained, TEXTS, measures=["stream"], sequence=SEQUENCE, output=tmp_path / "a")
    for other in ({"text": TEXTS[:20]}, {"seed": 1}, {"sequence": 32}, {"layers": [1]}):
        options = {"text": TEXTS, "sequence": SEQUENCE, **other}
        with pytest.raises(UserError, match="name another folder"):
            dissect(trained, options.pop("text"), measures=["stream"], output=tmp_path / "a", **options)
    trained.model.norm.weight.data[0] += 1
    with pytest.raises(UserError, match="dissection with model"):
        dissect(trained, TEXTS, measures=["stream"], sequence=SEQUENCE, output=tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("")
    with pytest.raises(UserError, match="not empty and not a dissection"):
        dissect(trained, TEXTS, measures=["stream"], output=tmp_path / "b")


def test_mistakes_are_named(trained, folder: Path, capsys: pytest.CaptureFixture) -> None:
    text = str(folder.parent / "text.jsonl")
    with pytest.raises(UserError, match="'skipp' is not known; did you mean skip"):
        dissect(trained, TEXTS, measures=["skipp"])
    for arguments, complaint in (
        (["--suggest", "profile"], "needs --budget"),
        (["--tokens", "1"], "at least 2"),
        (["--layers", "1,x"], "must be numbers"),
        (["--layers", "1,5"], "--layers has 5; the model's layers are 0 to 4"),
        (["--layers", "1", "--suggest", "profile", "--budget", "1M"], "leave out --layers"),
        (
            ["--measures", "stream", "--suggest", "plan", "--budget", "1M"],
            "--importance skip: not among the measures",
        ),
    ):
        assert cli.main(["anatomy", str(folder), "--text", text, "--sequence", "64", *arguments]) == 2
        assert complaint in capsys.readouterr().err


def test_the_command_and_its_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    command = ["anatomy", str(folder), "--text", str(folder.parent / "text.jsonl"), "--sequence", "64",
               "--measures", "structure,skip,zero_ffn,scale_0.9,delta_correlation,replacement", "--output", str(out)]  # fmt: skip
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "skip" in shown and "the layers that matter most" in shown
    answer = json.loads((out / "anatomy.json").read_text())
    assert answer["layers"] == 5 and len(answer["values"]) > 100
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"] == answer["values"]
    for width in (1100, 390):
        dom = browser.dom(out / "report.html", tmp_path, width=width)
        assert 'data-drawn="failed"' not in dom and dom.count('data-drawn="yes"') == 5
        assert 'data-overflow="0"' in dom
        assert "rank among the layers" in dom and "What the model loses without a layer" in dom


def test_a_profile_follows_the_importance(trained) -> None:
    shape = trained.shape
    values = np.array([5.0, 1.0, 2.0, 3.0, 4.0])
    wanted, solution = suggest.suggest_profile(shape, values, budget="60k", spread=0.5)
    widths = [layer.d_ff for layer in solution.shape.layers]
    assert np.argsort(widths).tolist() == np.argsort(values).tolist()
    assert widths[0] / widths[1] == pytest.approx(1.5 / 0.5, rel=0.1)
    assert cost.parameters(solution.shape) == pytest.approx(60_000, rel=0.01)
    assert [x.n_heads for x in solution.shape.layers] == [2] * 5 and solution.shape.norm == shape.norm
    assert specification.resolve(yaml.safe_load(yaml.safe_dump(wanted))).shape == solution.shape
    assert suggest.make_multipliers(np.ones(4)).tolist() == [1.0] * 4
    with pytest.raises(UserError, match="--spread is 1"):
        suggest.make_multipliers(values, 1)


@pytest.mark.parametrize("scale", ["heads", "both"])
def test_a_profile_of_heads(scale) -> None:
    shape = dataclasses.replace(untrained().shape, d_model=128, layers=(LayerShape(8, 8, 256),) * 5)
    values = np.array([5.0, 1.0, 2.0, 3.0, 4.0])
    _, solution = suggest.suggest_profile(
        shape, values, budget=cost.parameters(shape), spread=0.5, scale=scale
    )
    heads = [layer.n_heads for layer in solution.shape.layers]
    assert (
        np.argsort(heads, kind="stable").tolist() == np.argsort(values).tolist() and heads[0] >= 2 * heads[1]
    )
    assert len({layer.d_ff for layer in solution.shape.layers}) == (1 if scale == "heads" else 5)
    assert cost.parameters(solution.shape) == pytest.approx(cost.parameters(shape), rel=0.02)


def test_a_plan_trains_the_important_layers_first(trained, tmp_path: Path) -> None:
    values = np.array([5.0, 1.0, 2.0, 3.0, 4.0])
    text = suggest.suggest_plan(trained.shape, values, tokens="1M", data=Data(train="corpus", sequence=64))
    (tmp_path / "plan.yaml").write_text(text)
    recipe, shape, _ = resolve(recipes.read(tmp_path / "plan.yaml", ["batch.tokens=6400"]), 257)
    assert shape == trained.shape and recipe.tokens == 1_000_000 and len(recipe.stages) == 4
    assert [s for s in recipe.stages[0].trainable if s.startswith("blocks")] == ["blocks[0,4]"]
    assert recipe.stages[-1].trainable == "all"
    from entasis.shape.selectors import select

    assert "blocks.0.attention.query.weight" in select(trained.shape, recipe.stages[0].trainable)


def test_a_change_in_loss_counts_by_its_logarithm(trained) -> None:
    frame = dissect(trained, TEXTS, measures=["skip"], sequence=SEQUENCE)
    name, values = suggest.rank_importance(frame)
    skip = frame[frame["quantity"] == "skip"]["value"].to_numpy()
    assert name == "skip" and values == pytest.approx(np.log(np.maximum(skip, 1e-4)))


def test_what_an_untrained_layer_shows_by_chance_does_not_depend_on_how_much_text_is_read(tmp_path, capsys):
    """The control reads the first 2,048 tokens of the text, however much follows them."""
    folder = tmp_path / "model"
    folder.mkdir()
    loaded = untrained()
    weights.save(loaded.model, folder)
    loaded.tokenizer.save(folder / "tokenizer.json")
    (tmp_path / "text").mkdir()
    for i, text in enumerate(sentences(200, 3)):
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    found = {}
    for tokens in ("3k", "9k"):
        command = ["anatomy", str(folder), "--text", str(tmp_path / "text"), "--sequence", "64"]
        assert cli.main([*command, "--tokens", tokens, "--measures", "mean_output", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["values"]
        (found[tokens],) = (r["value"] for r in rows if r["quantity"] == "mean_output_chance")
    assert found["3k"] == pytest.approx(found["9k"], rel=1e-6)
