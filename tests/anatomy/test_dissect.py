"""`entasis.anatomy.dissect` and the command: frames, folders, mistakes, the page, suggestions."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
import browser
from small_models import SEQUENCE, SHAPE, sentences, untrained

from entasis import cli
from entasis.anatomy import charts, dissect, runner, suggest
from entasis.anatomy.measures import load_measures
from entasis.anatomy.runner import COLUMNS
from entasis.data.prepare import prepare
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
            ["--measures", "stream", "--suggest", "profile", "--budget", "1M"],
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
    values = suggest.rank_importance(frame, "skip", 5)
    skip = frame[frame["quantity"] == "skip"]["value"].to_numpy()
    assert values == pytest.approx(np.log(np.maximum(skip, 1e-4)))


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


def anatomy(capsys: pytest.CaptureFixture, model: Path, text: Path, *arguments: str) -> tuple[int, str, str]:
    """`entasis anatomy` with short windows: (exit code, output, errors)."""
    capsys.readouterr()
    code = cli.main(["anatomy", str(model), "--text", str(text), "--sequence", "64", *arguments])
    return code, *capsys.readouterr()


def write_texts(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    return folder


def save_model(loaded, folder: Path) -> Path:
    folder.mkdir()
    weights.save(loaded.model, folder)
    loaded.tokenizer.save(folder / "tokenizer.json")
    return folder


def test_long_documents_are_all_read(folder: Path, tmp_path: Path, capsys) -> None:
    books = write_texts(tmp_path / "books", [". ".join(sentences(60, seed)) for seed in range(5)])
    _, out, _ = anatomy(capsys, folder, books, "--tokens", "4k", "--measures", "loss", "--json")
    answer = json.loads(out)
    assert (answer["documents"], answer["tokens"]) == (5, 4000)
    assert all(row["low"] < row["value"] < row["high"] for row in answer["values"])


def test_the_column_of_a_text_in_rows_is_told(folder: Path, tmp_path: Path, capsys) -> None:
    rows = tmp_path / "rows" / "text.jsonl"  # documents are drawn by their names
    rows.parent.mkdir()
    rows.write_text((folder.parent / "text.jsonl").read_text().replace('{"text":', '{"body":'))
    _, told, _ = anatomy(capsys, folder, folder.parent / "text.jsonl", "--measures", "loss", "--json")
    answer = json.loads(told)
    _, told, _ = anatomy(capsys, folder, rows, "--measures", "loss", "--json", "--column", "body")
    assert json.loads(told) == answer
    code, _, said = anatomy(capsys, folder, rows, "--measures", "loss")
    assert code == 2 and "name the right one with --column" in said
    with pytest.raises(UserError, match="a list of documents has no columns"):
        dissect(folder, TEXTS, column="body")


def test_too_few_documents_for_intervals(folder: Path, tmp_path: Path, capsys) -> None:
    """Nothing is said to be tested, and nothing that was measured is missing."""
    two = write_texts(tmp_path / "two", TEXTS[:2])
    out = tmp_path / "out"
    told = ["--measures", "skip,scale_0.9", "--output", str(out)]
    code, shown, _ = anatomy(capsys, folder, two, *told)
    assert code == 0 and "2 documents are too few for intervals; nothing was tested." in shown
    assert "inf" not in shown and "harmful" not in shown
    page = (out / "report.html").read_text()
    assert "What a change of a layer's weights costs" in page.replace("&#x27;", "'") and "−inf" not in page
    values = json.loads((out / "anatomy.json").read_text())["values"]
    assert {(row["low"], row["high"], row["p"]) for row in values} == {(None, None, None)}
    for quantity in ("skip", "scale_0.9"):
        chosen = ["--suggest", "importance", "--importance", quantity]
        _, answer, _ = anatomy(capsys, folder, two, *told, *chosen)
        changes = [row["value"] for row in values if row["quantity"] == quantity]
        assert json.loads(answer)["importance"] == pytest.approx(np.log(np.maximum(changes, 1e-4)), rel=1e-4)


def test_any_ablation_has_a_finding(folder: Path, capsys) -> None:
    text = folder.parent / "text.jsonl"
    for name in ("swap", "half_ffn", "mean_output", "noise"):
        _, out, _ = anatomy(capsys, folder, text, "--measures", name)
        assert f"By {name.replace('_', ' ')}, the layers that matter most are" in out


def test_values_of_the_whole_model_are_shown(folder: Path, capsys) -> None:
    text = folder.parent / "text.jsonl"
    code, out, _ = anatomy(capsys, folder, text, "--measures", "replacement")
    assert code == 0 and "layer" not in out.split("No ablation")[0]
    lines = out.splitlines()
    found = {line.split(" ")[0]: line for line in lines}
    assert "bits per byte" in out and "[" in found["loss"]
    assert all(f" {count}: " in found["replaced"] for count in (1, 2, 4))


def test_small_values_keep_their_digits(trained, folder: Path, capsys) -> None:
    text = folder.parent / "text.jsonl"
    with torch.no_grad():
        trained.model.norm.weight *= 1e-6  # so that hardly anything has a gradient
    model = save_model(trained, folder.parent / "small")
    _, out, _ = anatomy(capsys, model, text, "--measures", "gradient", "--json")
    answer = json.loads(out)
    frame = dissect(model, text, measures=["gradient"], sequence=64)
    assert [row["value"] for row in answer["values"]] == frame["value"].tolist()
    fisher = [row["value"] for row in answer["values"] if row["quantity"] == "fisher_per_parameter"]
    assert all(0 < value < 1e-10 for value in fisher)
    assert answer["path"] == str(model) and len(answer["model"]) == 32


def test_curves_over_depth_have_lines_where_the_layers_lie(trained, tmp_path: Path) -> None:
    frame = pd.DataFrame({"layer": range(4), "value": [4.0, 0.3, -0.004, 0.02]})
    frame = frame.assign(low=frame["value"] - 0.01, high=frame["value"] + 0.01)
    drawn = charts.draw_curves({"skip": frame}, "nats").to_dict()
    axes = [
        layer["encoding"]["y"]["axis"]["values"]
        for layer in drawn["layer"]
        if "axis" in layer["encoding"]["y"]
    ]
    assert axes and all(sorted(values) == [-0.01, 0, 0.01, 0.1, 1] for values in axes)


PROFILE = ["--suggest", "profile", "--budget"]


@pytest.mark.parametrize(("arguments", "complaint"), [
    ([*PROFILE, "abc"], "budget is 'abc'"),
    ([*PROFILE, "10"], "10 is too small"),
    ([*PROFILE, "1M", "--spread", "1"], "--spread is 1.0; it must be from 0 to below 1"),
    (["--suggest", "importance", "--importance", "bogus"], "--importance bogus: not among the measures"),
    (["--suggest", "importance", "--importance", "skip_chance"], "--importance skip_chance: not among the measures"),
    (["--suggest", "importance", "--measures", "structure"], "--importance skip: not among the measures"),
    (["--suggest", "importance", "--budget", "1M"], "--budget belongs to --suggest profile and plan"),
    (["--suggest", "importance", "--spread", "0.2"], "--spread belongs to --suggest profile"),
    (["--suggest", "plan", "--budget", "1M"], "text.jsonl is no corpus"),
    (["--suggest", "plan", "--budget", "1M", "--scale", "ffn"], "--scale belongs to --suggest profile"),
    (["--budget", "1M"], "--budget belongs to --suggest profile and plan"),
    (["--importance", "skip"], "--importance belongs to --suggest profile and plan and importance"),
])  # fmt: skip
def test_a_suggestion_is_refused_before_anything_is_measured(
    arguments: list[str], complaint: str, folder: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(runner, "run_measures", lambda *_, **__: pytest.fail("something was measured"))
    code, _, errors = anatomy(capsys, folder, folder.parent / "text.jsonl", *arguments)
    assert code == 2 and complaint in errors


def test_a_profile_of_unlike_kv_groups_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(runner, "run_measures", lambda *_, **__: pytest.fail("something was measured"))
    shape = dataclasses.replace(SHAPE, layers=(LayerShape(2, 1, 64), LayerShape(4, 4, 64)))
    model = save_model(untrained(shape), tmp_path / "model")
    text = write_texts(tmp_path / "text", TEXTS)
    code, _, errors = anatomy(capsys, model, text, *PROFILE, "1M")
    assert code == 2 and "the layers differ in KV heads and in query heads per KV head" in errors


@pytest.mark.parametrize("layers", [5, 2])
def test_a_suggested_plan_can_be_trained(layers: int, tmp_path: Path, capsys) -> None:
    model = save_model(
        untrained(dataclasses.replace(SHAPE, layers=SHAPE.layers[:1] * layers)), tmp_path / "model"
    )
    text = write_texts(tmp_path / "text", TEXTS)
    prepare([text], tmp_path / "corpus", tokenizer="bytes", validation=0.3)
    for part in ("train", "validation"):
        code, out, _ = anatomy(
            capsys, model, tmp_path / "corpus" / part, "--suggest", "plan", "--budget", "1M"
        )
        assert code == 0
        (tmp_path / "plan.yaml").write_text(out)
        recipe, _, _ = resolve(recipes.read(tmp_path / "plan.yaml"), 257)
        assert (
            Path(recipe.data.train) == tmp_path / "corpus" / "train" and recipe.stages[-1].trainable == "all"
        )
        assert 90 < recipe.tokens / recipe.batch.tokens < 110 and not recipe.data.document_masking
    (model / "recipe.yaml").write_text("data: {document_masking: true}")
    _, out, _ = anatomy(capsys, model, tmp_path / "corpus" / "train", "--suggest", "plan", "--budget", "20k")
    assert yaml.safe_load(out)["data"]["document_masking"] is True


def test_layers_of_unlike_kv_groups_have_no_neighbour_average(tmp_path: Path, capsys) -> None:
    text = write_texts(tmp_path / "text", TEXTS)
    one, other = LayerShape(4, 2, 64), LayerShape(4, 4, 64)
    model = save_model(untrained(dataclasses.replace(SHAPE, layers=(one, one, other))), tmp_path / "some")
    code, out, errors = anatomy(capsys, model, text, "--measures", "ablation", "--json")
    rows = [row for row in json.loads(out)["values"] if row["quantity"] == "neighbour_average"]
    assert code == 0 and not errors and [row["layer"] for row in rows] == [0]
    model = save_model(untrained(dataclasses.replace(SHAPE, layers=(one, other, one))), tmp_path / "none")
    code, out, errors = anatomy(capsys, model, text, "--measures", "ablation", "--json")
    assert code == 0 and "neighbour_average is left out: no layer has neighbours whose KV groups" in errors
    found = {row["quantity"] for row in json.loads(out)["values"]}
    assert {"skip", "noise"} <= found and "neighbour_average" not in found
    code, _, errors = anatomy(capsys, model, text, "--measures", "skip,neighbour_average")
    assert code == 2 and "--measures neighbour_average: no layer has neighbours" in errors
    with pytest.raises(UserError, match="--measures neighbour_average"):
        dissect(model, TEXTS, measures=["neighbour_average"], sequence=64)


def test_masking_that_is_not_kept_is_said(folder: Path, capsys) -> None:
    text = folder.parent / "text.jsonl"
    assert "document_masking" not in anatomy(capsys, folder, text, "--measures", "loss")[2]
    (folder / "recipe.yaml").write_text("data: {document_masking: true}\n")
    assert (
        "document_masking, which anatomy does not know"
        in anatomy(capsys, folder, text, "--measures", "loss")[2]
    )
