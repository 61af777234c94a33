"""Training on several corpora: shares, places and scores, through the command; the same however a run is cut up."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from safetensors.numpy import load_file

from entasis.cli import main
from entasis.data.corpus import Corpus
from entasis.data.prepare import prepare
from entasis.errors import UserError
from entasis.evaluate.bits_per_byte import Score
from entasis.train.metrics import records
from entasis.train.recipe import to_yaml
from entasis.train.run import train

DOCS = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture(scope="session")
def verse(tmp_path_factory) -> Path:
    """A corpus that is read more than once in these runs."""
    folder = tmp_path_factory.mktemp("verse")
    for i in range(12):
        text = "".join(f"{i} lines of verse, and {j * i} more\n" for j in range(8))
        (folder / f"{i}.txt").write_text(text)
    prepare([folder], folder / "o", tokenizer="bytes", validation=0.2)
    return folder / "o"


@pytest.fixture
def mixed(recipe, corpora, verse):
    """A recipe of three stages: a mixture, the same corpora the other way round, the first mixture again."""

    def text(prose: float, code: float) -> dict:
        return {
            "prose": {"path": str(verse / "train"), "weight": prose},
            "code": {"path": str(corpora / "train"), "weight": code},
        }

    def make(**changes):
        held_out = {"prose": str(verse / "validation"), "code": str(corpora / "validation")}
        stages = [
            {"tokens": 512 * 5},
            {"tokens": 512 * 4, "data": {"train": text(0.2, 0.8)}},
            {"tokens": 512 * 3},
        ]
        data = {"train": text(0.7, 0.3), "validation": held_out}
        return recipe(**{"data": data, "stages": stages, "tokens": None, **changes})

    return make


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in records(folder)]


def test_shares_epochs_and_scores_of_each_corpus_are_told(mixed, verse, corpora, tmp_path, capsys):
    (tmp_path / "m.yaml").write_text(to_yaml(mixed(evaluation={"every": 4})))
    assert main(["train", str(tmp_path / "m.yaml"), "--output", str(tmp_path / "run"), "--json"]) == 0
    caught = capsys.readouterr()
    result = json.loads(caught.out)
    # 8 sequences a step: 40 at 0.7, 32 at 0.2, 24 at 0.7 again; 28 + 6 + 17 of them verse.
    windows = {
        path: (Corpus(path).tokens - 1) // 64 for path in (str(verse / "train"), str(corpora / "train"))
    }
    read = {str(verse / "train"): 28 + 6 + 17, str(corpora / "train"): 12 + 26 + 7}
    assert result["epochs"] == {path: n / windows[path] for path, n in read.items()}
    verses = result["epochs"][str(verse / "train")]
    assert verses > 1 and f"note: {verse / 'train'} is read {verses:.2f} times" in caught.err
    assert f"data: prose 70 % ({verses:.2f} epochs), code 30 % (" in caught.err
    parts, whole = result["validation"]["by_corpus"], result["validation"]
    assert whole["nll"] == pytest.approx(sum(part["nll"] for part in parts.values()))
    assert whole["bytes"] == sum(part["bytes"] for part in parts.values())
    assert parts["prose"]["bits_per_byte"] != parts["code"]["bits_per_byte"]
    stored = load_file(tmp_path / "run" / "validation.safetensors")
    assert Score(**{name: stored[name] for name in Score.ARRAYS}).nll_sum == pytest.approx(whole["nll"])
    row = records(tmp_path / "run")[3]
    assert {f"validation_bits_per_byte/{name}" for name in parts} <= set(row)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert {"train.prose", "train.code", "validation.prose", "validation.code"} <= set(environment["data"])


def test_stopped_anywhere_it_goes_on_with_the_same_losses(mixed, tmp_path):
    """Inside a stage and at the boundaries at which the weights change."""
    whole = train(mixed(checkpoint={"every": 1}), tmp_path / "whole")
    for stop in (2, 5, 8, 9):

        def end(event, stop=stop):
            if event["event"] == "checkpoint" and event["step"] == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(mixed(checkpoint={"every": 1}), tmp_path / "cut", reporter=end)
    again = train(mixed(checkpoint={"every": 1}), tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert again["validation"] == whole["validation"] and again["epochs"] == whole["epochs"]


def test_a_later_run_goes_on_where_each_corpus_was_left(mixed, tmp_path):
    first = train(mixed(), tmp_path / "first")
    start = {"from": str(tmp_path / "first"), "optimizer_state": "keep"}
    later = train(mixed(shape=None, start=start), tmp_path / "later")
    for path, epochs in first["epochs"].items():
        assert later["epochs"][path] == pytest.approx(2 * epochs, rel=0.1)
        assert later["epochs"][path] > epochs


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_killed_and_gone_on_with_alone_train_as_one(mixed, tmp_path):
    recipe = mixed(checkpoint={"every": 1}, optimizer={"eps": 1e-5})
    train(recipe, tmp_path / "one")
    (tmp_path / "m.yaml").write_text(to_yaml(recipe))
    entasis = [
        "-m",
        "entasis",
        "train",
        str(tmp_path / "m.yaml"),
        "--output",
        str(tmp_path / "two"),
        "--json",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    both = subprocess.Popen(
        [*torchrun, *entasis],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    checkpoints = tmp_path / "two" / "checkpoints"
    deadline = time.monotonic() + 240
    while (
        not list(checkpoints.glob("step-*3/complete")) and both.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    launcher = psutil.Process(both.pid)
    for process in [*launcher.children(recursive=True), launcher]:  # ranks have sessions of their own
        process.kill()
    both.communicate()
    assert not (tmp_path / "two" / "result.json").exists(), "it was killed too late"
    assert list(checkpoints.glob("step-*/complete")), "it was killed before it had saved"
    done = subprocess.run(
        [sys.executable, *entasis], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_mistakes_in_a_mixture_are_refused_before_the_first_step(mixed, recipe, corpora, verse, tmp_path):
    code = {"path": str(corpora / "train"), "weight": 1.0}

    def refused(says: str, **changes):
        with pytest.raises(UserError, match=says):
            train(mixed(**changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    refused("nowhere: no corpus here", data={"train": {"a": code, "b": {"path": "nowhere", "weight": 1}}})
    twice = {"a": code, "b": {**code, "weight": 2.0}}
    refused("recipe: data.train: a and b are the same text", data={"train": twice})
    later = [{"tokens": 2048}, {"tokens": 2048, "data": {"train": twice}}]
    refused(r"recipe: stages\[1\]\.data\.train: a and b are the same text", stages=later)
    fine = {"a": {**code, "weight": 0.123457}, "b": {"path": str(verse / "train"), "weight": 0.876543}}
    refused(r"recipe: data\.train: weights a 0.123457, b 0.876543: in whole numbers", data={"train": fine})
    prepare([verse.parent / "1.txt"], tmp_path / "other", train_tokenizer=260, validation=0)
    other = {"a": code, "b": {"path": str(tmp_path / "other" / "train"), "weight": 1}}
    refused("another tokenizer", data={"train": other})
    plain = {"a": {"path": str(corpora / "train")}, "b": {"path": str(verse / "train")}}
    refused("recipe: data.train.a.weight is missing", data={"train": plain})
    refused("did you mean proportional", data={"train": plain, "weights": "proportionate"})
    refused("temperature: alpha is 2", data={"train": plain, "weights": {"temperature": {"alpha": 2.0}}})
    refused(
        "gives both train.a.weight and weights",
        data={"train": {"a": code, "b": code}, "weights": "proportional"},
    )
    refused("names one", data={"train": str(corpora / "train"), "weights": "proportional"})
    text = {"a": str(verse / "validation"), "b": "nowhere"}
    refused("nowhere: no corpus here", data={"validation": text})


def test_weights_by_rule_follow_the_corpora_s_tokens(mixed, verse, corpora, tmp_path, capsys):
    paths = {"prose": str(verse / "train"), "code": str(corpora / "train")}
    tokens = {name: Corpus(path).tokens for name, path in paths.items()}
    text = {name: {"path": path} for name, path in paths.items()}
    first = {"train": text, "weights": {"temperature": {"alpha": 0.5}}}
    later = [{"tokens": 2048}, {"tokens": 2048, "data": {"train": text, "weights": "proportional"}}]
    (tmp_path / "m.yaml").write_text(to_yaml(mixed(data=first, stages=later)))
    command = ["train", str(tmp_path / "m.yaml"), "--output", str(tmp_path / "run"), "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    stored = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    for data, alpha in ((stored["data"], 0.5), (stored["stages"][1]["data"], 1.0)):
        total = sum(n**alpha for n in tokens.values())
        assert data["weights"] is None
        for name, n in tokens.items():
            assert data["train"][name]["weight"] == pytest.approx(n**alpha / total, abs=6e-5)
    # 32 sequences of each stage, by these numbers.
    read = sum(round(32 * s["data"]["train"]["code"]["weight"]) for s in (stored, stored["stages"][1]))
    windows = (tokens["code"] - 1) // 64
    assert result["epochs"][paths["code"]] == pytest.approx(read / windows, abs=1.01 / windows)
    # The same command means this run, and so do its numbers; another rule does not.
    assert main(command) == 0 and json.loads(capsys.readouterr().out) == result
    assert main(["train", str(tmp_path / "run" / "recipe.yaml"), *command[2:]]) == 0
    assert main([*command, "data.weights.temperature.alpha=0.2"]) == 2
    assert "data.train.prose.weight is " in capsys.readouterr().err


def test_one_corpus_in_a_mixture_is_that_corpus(recipe, corpora, tmp_path):
    alone = {"only": {"path": str(corpora / "train"), "weight": 2.5}}
    train(recipe(), tmp_path / "plain")
    train(recipe(data={"train": alone}), tmp_path / "mixture")
    assert losses(tmp_path / "mixture") == losses(tmp_path / "plain")


def test_the_documented_mixture_trains(verse, corpora, tmp_path, monkeypatch, capsys):
    block = next(
        b for b in re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL) if "weight: 0.7" in b
    )
    monkeypatch.chdir(tmp_path)
    for name, there in (("prose", verse), ("code", corpora)):
        shutil.copytree(there, tmp_path / "corpora" / name)
    (tmp_path / "mixture.yaml").write_text(block)
    small = [
        "batch.tokens=2048",
        "stages.0.tokens=6k",
        "stages.1.tokens=4k",
        "precision=fp32",
        "compile=false",
    ]
    small += [
        "attention=plain",
        "evaluation.tokens=2k",
        "logging.tensorboard=false",
        "shape.budget=60k",
        "shape.d_model=32",
    ]
    assert main(["train", "mixture.yaml", *small, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["validation"]["by_corpus"]) == {"prose", "code"}
    assert np.isfinite(result["loss"])


def test_arms_of_a_study_may_differ_in_the_mixture_and_are_judged_on_one_corpus(mixed, tmp_path, capsys):
    base = yaml.safe_load(to_yaml(mixed()))
    base |= {"tokens": 4096, "stages": []}
    held_out = base["data"]["validation"]
    base["data"]["validation"] = held_out["code"]
    study = {
        "base": base,
        "arms": {"even": {}, "tilted": {"data.train.prose.weight": 0.1}},
        "baseline": "even",
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(study))
    assert main(["study", "plan", str(tmp_path / "s.yaml"), "--quick"]) == 0
    base["data"]["validation"] = held_out
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(study))
    assert main(["study", "plan", str(tmp_path / "s.yaml"), "--quick"]) == 2
    assert "arm even has several corpora in data.validation; a study judges on one" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.xdist_group("study")
def test_a_study_knows_its_runs_whose_weights_follow_a_rule_again(mixed, tmp_path, capsys):
    base = yaml.safe_load(to_yaml(mixed()))
    base |= {"tokens": 1024, "stages": []}
    base["data"]["validation"] = base["data"]["validation"]["code"]
    for corpus in base["data"]["train"].values():
        del corpus["weight"]
    base["data"]["weights"] = "proportional"
    study = {
        "base": base,
        "arms": {"all": {}, "even": {"data.weights": {"temperature": {"alpha": 0}}}},
        "seeds": 1,
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(study))
    command = ["study", "run", str(tmp_path / "s.yaml"), "--output", str(tmp_path / "s"), "--json"]
    assert main(command) == 0 and main(command) == 0
    weights = {
        arm: yaml.safe_load((tmp_path / "s/runs" / arm / "seed-0/recipe.yaml").read_text())["data"]["train"]
        for arm in study["arms"]
    }
    assert (
        {c["weight"] for c in weights["even"].values()}
        == {0.5}
        != {c["weight"] for c in weights["all"].values()}
    )
