"""The main path as a user walks it, through the installed command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("main-path")

RECIPE = """
shape: {profile: crown, layers: 4, d_model: 32, head_dim: 8, tied_embeddings: true, context: 64}
data: {train: %(corpus)s/train, validation: %(corpus)s/validation, sequence: 64}
batch: {tokens: 512}
optimizer: {lr: 3e-3}
evaluation: {tokens: 5k}
checkpoint: {every: 10}
tokens: 20k
compile: false
precision: fp32
attention: sdpa
"""


def entasis(*arguments, **options):
    command = [sys.executable, "-m", "entasis", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus, a recipe and a finished run."""
    folder = tmp_path_factory.mktemp("place")
    corpus = folder / "corpus"
    made = entasis(
        "data",
        "prepare",
        "stdlib",
        "--limit",
        "800k",
        "--train-tokenizer",
        "512",
        "--output",
        corpus,
        "--json",
    )
    assert made.returncode == 0, made.stderr
    (folder / "recipe.yaml").write_text(RECIPE % {"corpus": corpus})
    trained = entasis("train", folder / "recipe.yaml", "--output", folder / "run", "--json")
    assert trained.returncode == 0, trained.stderr
    return folder


def test_a_run_folder_holds_everything_and_learned_something(place):
    run = place / "run"
    for name in (
        "recipe.yaml",
        "shape.json",
        "environment.json",
        "metrics.jsonl",
        "model.safetensors",
        "tokenizer.json",
    ):
        assert (run / name).is_file()
    assert (
        len({file.stat().st_mode for file in run.iterdir() if file.is_file() and file.name != ".lock"}) == 1
    )
    result = json.loads((run / "result.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in metrics if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    assert 0 < result["validation"]["bits_per_byte"] < 8


def test_the_same_command_answers_and_its_own_recipe_repeats_it(place):
    before = (place / "run" / "result.json").read_bytes()
    again = entasis("train", place / "recipe.yaml", "--output", place / "run", "--json")
    assert again.returncode == 0
    assert (place / "run" / "result.json").read_bytes() == before
    repeat = entasis("train", place / "run" / "recipe.yaml", "--output", place / "repeat", "--json")
    assert repeat.returncode == 0, repeat.stderr
    first, second = (json.loads((place / n / "result.json").read_text()) for n in ("run", "repeat"))
    assert first["validation"] == second["validation"]


def test_killed_it_goes_on_to_the_same_end(place):
    command = ["train", place / "recipe.yaml", "--output", place / "killed"]
    child = subprocess.Popen(
        [sys.executable, "-m", "entasis", *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while (
        not list((place / "killed" / "checkpoints").glob("step-*/complete")) and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    done = entasis(*command)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((place / n / "result.json").read_text()) for n in ("run", "killed"))
    assert first["validation"] == second["validation"]


def test_a_trained_model_is_scored_continued_and_exported(place):
    scored = json.loads(
        entasis("evaluate", place / "run", "--text", place / "corpus" / "validation", "--json").stdout
    )
    assert 0 < scored["text"]["interval"][0] < scored["text"]["bits_per_byte"] < scored["text"]["interval"][1]
    made = json.loads(
        entasis("generate", place / "run", "--prompt", "import", "--tokens", "5", "--json").stdout
    )
    assert 1 <= len(made["continuations"][0]["tokens"]) <= 5
    for to in ("hf", "gguf", "padded"):
        assert entasis("export", place / "run", "--to", to, "--output", place / f"as-{to}").returncode == 0
    other = json.loads(
        entasis("evaluate", place / "as-gguf" / "model-f32.gguf", "--text", __file__, "--json").stdout
    )
    ours = json.loads(entasis("evaluate", place / "run", "--text", __file__, "--json").stdout)
    assert other["text"]["nll"] == pytest.approx(ours["text"]["nll"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "{recipe}", "optimizer.lrr=1", "--output", "x"], "optimizer.lr"),
        (["train", "{recipe}", "shape.head_dim=7", "--output", "x"], "head_dim is 7"),
        (["train", "{recipe}", "data.train=nowhere", "--output", "x"], "no corpus here"),
        (["train", "{recipe}", "seed=3", "--output", "{run}"], "seed"),
        (["shape", "crown-paper/crwon-18"], "did you mean"),
        (["generate", "nowhere", "--prompt", "x"], "no model here"),
        (["evaluate", "nowhere", "--text", "x"], "no model here"),
        (["export", "{run}", "--to", "onnx", "--output", "x"], "choose one of"),
        (["study", "run", "quikstart"], "quickstart"),
        (["import", "nowhere", "x"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(place, tmp_path, arguments, says):
    names = {"recipe": place / "recipe.yaml", "run": place / "run"}
    done = entasis(
        *[a.format(**names) for a in arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "verb", ["shape", "data", "train", "study", "generate", "evaluate", "export", "import"]
)
def test_every_verb_has_help_with_an_example(verb):
    done = entasis(verb, "--help")
    assert done.returncode == 0
    assert f"entasis {verb}" in done.stdout.split("usage:")[1].split("\n", 1)[1]
