"""Every file of a run × every damage: the right result, or one line. `make attacks` runs all, `make test` a part."""

import json
import shutil

import pytest
from safetensors.numpy import load_file

from .conftest import losses
from .damage import DAMAGES

FINISHED = [
    "recipe.yaml", "shape.json", "environment.json", "tokenizer.json", "metrics.jsonl",
    "model.safetensors", "optimizer.safetensors", "validation.safetensors", "result.json",
]  # fmt: skip
CHECKPOINT = ["__0_0.distcp", ".metadata", "state.json", "complete", "model.safetensors", "shape.json"]
OPEN = ["recipe.yaml", "shape.json", "environment.json", "tokenizer.json", "metrics.jsonl"]


def pairs(names, often):
    """(file, damage): all of them, those not in `often` left to `make attacks`."""
    return [
        pytest.param(name, kind, marks=() if (name, kind) in often else pytest.mark.attack)
        for name in names
        for kind in DAMAGES
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    pairs(
        FINISHED,
        {
            ("model.safetensors", "zeroed_block"),
            ("shape.json", "one_byte_flipped"),
            ("tokenizer.json", "empty"),
        },
    ),
)
def test_a_finished_model_says_the_same_or_nothing(call, ground, run, tmp_path, name, kind):
    right = call("evaluate", ground / "run", "--text", ground / "corpus" / "validation", "--json")
    DAMAGES[kind](run / name)
    touches = name in ("model.safetensors", "shape.json", "tokenizer.json")
    verbs = {
        "evaluate": ["--text", ground / "corpus" / "validation", "--json"],
        "generate": ["--prompt", "import", "--tokens", "3"],
        "export": ["--to", "hf", "--output", tmp_path / "out"],
    }
    for verb, options in verbs.items():
        answer = call(verb, run, *options)
        if not touches or answer.code == 0:
            # Without a tokenizer ids are still ids; a model card leaves out a result that it cannot read.
            assert not touches or (name, kind) == ("tokenizer.json", "missing")
            if verb == "evaluate" and not answer.code:
                assert json.loads(answer.out)["text"] == json.loads(right.out)["text"]
            if answer.code:
                answer.refused("damaged: ", str(run / name))
        elif (name, kind) == ("tokenizer.json", "missing"):
            answer.refused("tokenizer")
        elif kind == "missing":
            answer.refused(name)
        else:
            answer.refused("damaged: ", name)
            assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "kind"), pairs(FINISHED, {("result.json", "truncated"), ("metrics.jsonl", "one_byte_flipped")})
)
def test_a_finished_run_answers_with_its_numbers_or_says_what_is_wrong(call, ground, run, name, kind):
    right = json.loads((run / "result.json").read_text())
    DAMAGES[kind](run / name)
    answer = call("train", ground / "recipe.yaml", "--output", run, "--json")
    if answer.code:
        assert name in ("recipe.yaml", "environment.json")
        answer.refused(str(run))
        return
    told = json.loads(answer.out)
    assert (told["validation"], told["loss"]) == (right["validation"], right["loss"])
    said_when_asked = ("metrics.jsonl", "validation.safetensors", "optimizer.safetensors")
    if name in said_when_asked or (name, kind) == ("model.safetensors", "missing"):
        assert any("damaged: " in line and name in line for line in answer.lines), answer.err
    if name == "result.json":
        assert json.loads((run / name).read_text())["validation"] == right["validation"]


@pytest.mark.parametrize(
    ("name", "kind"),
    pairs(
        CHECKPOINT, {("__0_0.distcp", "zeroed_block"), (".metadata", "truncated"), ("state.json", "empty")}
    ),
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(call, ground, interrupted, name, kind):
    newest = interrupted / "checkpoints" / "step-00000008"
    DAMAGES[kind](newest / name)
    answer = call("train", ground / "recipe.yaml", "--output", interrupted, "--json")
    assert answer.code == 0, answer.err
    assert "Traceback" not in answer.err
    if name == "complete" and kind == "empty":
        assert any("earlier version" in line for line in answer.lines)
    elif name != "complete" or kind != "missing":  # without its mark it was never whole
        assert any("damaged: " in line and "step-00000008" in line for line in answer.lines), answer.err
        assert "going on from step 6" in answer.err
    same_as_undisturbed(ground, interrupted)


@pytest.mark.parametrize(
    ("name", "kind"), pairs(OPEN, {("environment.json", "truncated"), ("metrics.jsonl", "missing")})
)
def test_a_run_under_way_goes_on_to_the_same_end_or_is_refused(call, ground, interrupted, name, kind):
    DAMAGES[kind](interrupted / name)
    answer = call("train", ground / "recipe.yaml", "--output", interrupted, "--json")
    if answer.code == 0:
        assert name in ("shape.json", "tokenizer.json", "metrics.jsonl")
        same_as_undisturbed(ground, interrupted)
        if name != "metrics.jsonl" and kind != "missing":
            assert any("damaged: " in line and name in line for line in answer.lines), answer.err
    else:
        answer.refused(str(interrupted))
        if name in ("environment.json", "metrics.jsonl"):
            answer.refused("damaged: ", name)
            assert not (interrupted / "result.json").exists()


def test_an_older_checkpoint_s_file_in_a_newer_one_is_noticed(call, ground, interrupted):
    checkpoints = interrupted / "checkpoints"
    shutil.copy(checkpoints / "step-00000006" / "__0_0.distcp", checkpoints / "step-00000008")
    answer = call("train", ground / "recipe.yaml", "--output", interrupted)
    assert any("damaged: " in line and "__0_0.distcp" in line for line in answer.lines)
    same_as_undisturbed(ground, interrupted)


def test_without_a_sound_checkpoint_a_run_is_refused_and_never_restarted(call, ground, interrupted):
    for folder in (interrupted / "checkpoints").iterdir():
        DAMAGES["truncated"](folder / ".metadata")
    before = (interrupted / "metrics.jsonl").read_bytes()
    call("train", ground / "recipe.yaml", "--output", interrupted).refused("damaged: ", "no other checkpoint")
    assert (interrupted / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_without_result_and_checkpoints_is_not_trained_again(call, ground, run):
    shutil.rmtree(run / "checkpoints")
    (run / "result.json").unlink()
    before = (run / "model.safetensors").read_bytes()
    call("train", ground / "recipe.yaml", "--output", run).refused("damaged: ", "neither")
    assert (run / "model.safetensors").read_bytes() == before


def test_two_hundred_flipped_bytes_of_an_imported_model_are_noticed(call, ground, tmp_path):
    assert call("export", ground / "run", "--to", "hf", "--output", tmp_path / "hf").code == 0
    assert call("import", tmp_path / "hf", tmp_path / "imported").code == 0
    weights = tmp_path / "imported" / "model.safetensors"
    assert load_file(weights)
    content = bytearray(weights.read_bytes())
    content[-400:-200] = bytes(byte ^ 0xFF for byte in content[-400:-200])
    weights.write_bytes(content)
    text = ground / "corpus" / "validation"
    call("evaluate", tmp_path / "imported", "--text", text).refused("damaged: ", "model.safetensors")


@pytest.mark.parametrize("of", [".", "checkpoints/step-00000004"])
@pytest.mark.parametrize(
    ("name", "kind"), pairs(["optimizer.safetensors"], {("optimizer.safetensors", "one_byte_flipped")})
)
def test_damaged_moments_are_not_trained_on(call, ground, run, tmp_path, of, name, kind):
    DAMAGES[kind](run / of / name)
    start = [f"start.from={run / of}", "start.optimizer_state=keep"]
    answer = call("train", ground / "recipe.yaml", "--output", tmp_path / "next", *start)
    answer.refused(name, *([] if kind == "missing" else ["damaged: "]))


def same_as_undisturbed(ground, folder):
    assert losses(folder) == losses(ground / "run")
    for name in ("model.safetensors", "validation.safetensors"):
        assert (folder / name).read_bytes() == (ground / "run" / name).read_bytes(), name
