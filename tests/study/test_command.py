"""Studies through the command: what is refused before anything runs, and what a finished folder is judged by."""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import yaml
from safetensors.numpy import load_file, save_file

from entasis import files
from entasis.cli import main, parse
from entasis.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("study")]

Command = Callable[..., tuple[int, str, str]]
MODULES = ("argparse", "ast", "difflib", "inspect", "tarfile", "typing", "zipfile", "shutil", "calendar", "cgitb",
           "cmd", "codecs", "copy", "csv", "dis", "enum", "glob", "gzip")  # fmt: skip


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some modules of the standard library, prepared."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for name in MODULES:
        if Path(os.__file__).with_name(f"{name}.py").is_file():
            shutil.copy(Path(os.__file__).with_name(f"{name}.py"), folder / "text")
    command = ["data", "prepare", str(folder / "text"), "--train-tokenizer", "512", "--validation", "0.4"]
    assert main([*command, "--output", str(folder / "code")]) == 0
    return folder


@pytest.fixture
def entasis(capfd: pytest.CaptureFixture[str]) -> Command:
    """`entasis …` in this process: (exit code, output, errors)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        out, errors = capfd.readouterr()
        return code, out, errors

    return call


def write(folder: Path, corpus: Path, **changes: Any) -> Path:
    """A study file over the corpus; `base` is merged, other keys replaced."""
    base = {
        "shape": {"profile": "isotropic", "budget": "90k", "layers": 4, "d_model": 32, "head_dim": 8,
                  "vocabulary": 512, "tied_embeddings": True, "context": 32},
        "data": {"train": str(corpus / "code/train"), "validation": str(corpus / "code/validation"), "sequence": 32},
        "tokens": 2048,
        "batch": {"tokens": 256},
        "optimizer": {"lr": 5e-3},
        "evaluation": {"tokens": "6k"},
        "checkpoint": {"every": None},
        "logging": {"tensorboard": False},
        "precision": "fp32",
        "attention": "sdpa",
        "compile": False,
    }  # fmt: skip
    source = {
        "arms": {"plain": {}, "slope": {"shape.profile": "vanilla"}},
        "seeds": 2,
        "threads": 1,
    } | changes
    source["base"] = base | changes.get("base", {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(source, sort_keys=False))
    return folder / "study.yaml"


@pytest.mark.parametrize(
    ("arms", "protocols", "words"),
    [
        ({"longer": {"tokens": 4096}}, ["params"], "longer trains on 4,096 tokens in batches of 256, plain on 2,048"),
        ({"odd": {"batch.tokens": 288}}, ["params"], "odd trains on 2,016 tokens in batches of 288"),
        ({"longer": {"tokens": 4096}}, ["flops"], "longer sets tokens, but under flops its length follows from plain"),
        ({"longer": {"tokens": 2048}}, ["time"], "longer sets tokens, but under time its length"),
        ({"staged": {"stages": [{"tokens": 2048}]}}, ["time"], "staged sets the tokens of its stages"),
    ],
)  # fmt: skip
def test_an_arm_of_another_length_is_refused(
    entasis: Command, corpus: Path, tmp_path: Path, arms: dict[str, Any], protocols: list[str], words: str
) -> None:
    file = write(tmp_path, corpus, arms={"plain": {}, **arms}, protocols=protocols)
    code, _, errors = entasis("study", "plan", file, "--output", tmp_path / "s")
    assert code == 2 and words in errors and errors.count("\n") == 1


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study under two protocols: two arms, and one that is the baseline by another name."""
    folder = tmp_path_factory.mktemp("finished")
    arms = {"plain": {}, "twin": {"shape.profile": "isotropic"}, "slope": {"shape.profile": "vanilla"},
            "deep": {"shape.layers": 8}}  # fmt: skip
    file = write(
        folder, corpus, arms=arms, seeds=3, protocols=["params", "flops"], tolerance="9%", margin=0.02
    )
    assert main(["study", "run", str(file), "--output", str(folder / "s"), "--json"]) == 0
    return folder / "s"


def set_score(run: Path, bits_per_byte: float) -> None:
    """Gives a finished run another score: the documents' losses and what follows from them."""
    arrays = load_file(run / "validation.safetensors")
    result = files.read_json(run / "result.json")
    told = result["validation"]
    arrays["document_nll"] *= bits_per_byte / told["bits_per_byte"]
    told["nll"] = float(arrays["document_nll"].sum())
    told["bits_per_byte"] = told["nll"] / (told["bytes"] * math.log(2))
    told["perplexity"] = math.exp(told["nll"] / told["tokens"])
    save_file(arrays, run / "validation.safetensors")
    result["files"]["validation.safetensors"] = files.hash_of(run / "validation.safetensors")
    files.write_json(run / "result.json", {k: v for k, v in result.items() if k != files.SEAL})


def reported(
    entasis: Command, finished: Path, folder: Path, scores: dict[str, list[float]], **keys: Any
) -> dict[str, Any]:
    """The verdict of the finished study with these differences to the baseline, seed by seed, and these keys."""
    shutil.copytree(finished, folder)
    plain = yaml.safe_load((folder / "study.yaml").read_text())
    (folder / "study.yaml").write_text(yaml.safe_dump(plain | keys, sort_keys=False))
    for seed, base in enumerate((2.0, 2.1, 2.05)):
        for name in ("plain", "twin"):
            set_score(folder / f"runs/{name}/seed-{seed}", base)
        for name, values in scores.items():
            set_score(folder / f"runs/{name}/seed-{seed}", base + values[seed])
    code, out, errors = entasis("study", "report", folder, "--json")
    assert code == 0, errors
    return json.loads(out)


def test_the_family_is_all_that_was_planned_and_an_arm_that_is_the_baseline_is_no_part_of_it(
    entasis: Command, finished: Path, tmp_path: Path
) -> None:
    differences = {"slope": [-0.030, -0.031, -0.029], "deep": [0.01, -0.011, 0.004]}
    verdict = reported(entasis, finished, tmp_path / "s", {**differences, "deep@flops": [0.0, 0.012, -0.013]})
    # slope costs as much as plain under both protocols, so the two share its runs; twin is plain.
    shared = not (finished / "runs/slope@flops").exists()
    assert verdict["comparisons"] == (3 if shared else 4)
    arms = verdict["protocols"]["params"]["arms"]
    assert arms["twin"]["judgement"] == "itself" and arms["twin"]["difference"] is None
    assert "twin is plain itself, of the same shape and recipe" in verdict["sentence"]
    slope = arms["slope"]["difference"]
    assert slope["p_holm"] == pytest.approx(verdict["comparisons"] * slope["p"])
    noise = [np.std(x, ddof=1) for x in (*differences.values(), [0.0, 0.012, -0.013])]
    assert slope["noise"] == pytest.approx(np.sqrt(np.mean(np.square(noise))), rel=1e-3)
    assert "3 comparisons (Holm)" in (tmp_path / "s/report.html").read_text()


CONTRASTS = {"slope": ["deep"], "twin": ["slope"]}


def test_contrasts_are_judged_together_with_the_rest(
    entasis: Command, finished: Path, tmp_path: Path
) -> None:
    scores = {"slope": [-0.030, -0.031, -0.029], "deep": [0.01, -0.011, 0.004]}
    scores["deep@flops"] = [0.0, 0.012, -0.013]
    verdict = reported(entasis, finished, tmp_path / "s", scores, contrasts=CONTRASTS)
    # slope against plain and twin against slope are the same runs under both protocols; deep has others.
    assert verdict["comparisons"] == 6
    for protocol, deep in (("params", "deep"), ("flops", "deep@flops")):
        against_deep, twin = verdict["protocols"][protocol]["contrasts"]
        d = against_deep["difference"]
        expected = scipy.stats.ttest_rel(scores["slope"], scores[deep])
        assert (against_deep["arm"], against_deep["against"]) == ("slope", "deep")
        assert d["mean"] == pytest.approx(np.mean(np.subtract(scores["slope"], scores[deep])), abs=1e-6)
        assert d["p"] == pytest.approx(expected.pvalue, rel=1e-3)
        assert against_deep["differences"]["2"] == pytest.approx(
            scores["slope"][2] - scores[deep][2], abs=1e-6
        )
        assert twin["judgement"] == "worse" and "twin is worse than slope by 0.0300" in verdict["sentence"]
        assert twin["difference"]["p_holm"] == pytest.approx(6 * twin["difference"]["p"])
    # The noise of contrasts is their own: twin against slope counts in it, plain against slope does not.
    apart = [
        np.subtract(scores["slope"], scores["deep"]),
        np.subtract(scores["slope"], scores["deep@flops"]),
        np.negative(scores["slope"]),
    ]
    assert d["noise"] == pytest.approx(np.sqrt(np.mean([np.var(x, ddof=1) for x in apart])), rel=1e-3)
    assert "Contrasts that the study names" in (tmp_path / "s/report.html").read_text()
    assert "slope,deep,3" in (tmp_path / "s/tables/contrasts-params.csv").read_text()


def test_contrasts_of_a_study_that_adds_seeds_have_looks(
    entasis: Command, finished: Path, tmp_path: Path
) -> None:
    scores = {"slope": [-0.030, -0.031, -0.029], "deep": [0.01, -0.011, 0.004]}
    verdict = reported(entasis, finished, tmp_path / "s", scores, contrasts=CONTRASTS, until={"seeds": 3})
    twin = verdict["protocols"]["params"]["contrasts"][1]
    assert [look["n"] for look in twin["looks"]] == [1, 2, 3] and verdict["complete"]
    code, out, errors = entasis("study", "report", tmp_path / "s")
    assert code == 0, errors
    assert "against" in out and "known to" in out
    looked = {"seeds": 3, "method": "looks", "looks": [2, 3]}
    reported(entasis, finished, tmp_path / "looks", scores, contrasts=CONTRASTS, until=looked)
    rows = (tmp_path / "looks/tables/looks-params.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows if row.startswith("twin − slope,")] == ["2", "3"]
    assert "slope − deep" in (tmp_path / "looks/charts/trajectory-params.svg").read_text()


@pytest.mark.parametrize(
    ("contrasts", "says"),
    [
        ({"slope": ["dep"]}, "contrasts: slope: dep: 'dep' is no arm; did you mean deep?"),
        ({"slope": ["plain"]}, "every arm is compared with the baseline, plain, anyway"),
        ({"slope": ["slope"]}, "an arm is compared with itself, or two arms twice"),
        ({"slope": ["deep"], "deep": ["slope"]}, "an arm is compared with itself, or two arms twice"),
        ({"slope": ["half"]}, "half is a control"),
        ({"slope": "deep"}, "contrasts.slope"),
    ],
)
def test_contrasts_that_ask_nothing_are_refused(
    contrasts: dict[str, Any], says: str, entasis: Command, corpus: Path, tmp_path: Path
) -> None:
    arms = {"plain": {}, "slope": {"shape.profile": "vanilla"}, "deep": {"shape.layers": 8},
            "half": {"control": True}}  # fmt: skip
    file = write(tmp_path, corpus, arms=arms, contrasts=contrasts)
    code, _, errors = entasis("study", "plan", file)
    assert code == 2 and says in errors and errors.count("\n") == 1


def test_seeds_that_agree_by_luck_do_not_make_an_arm_the_same(
    entasis: Command, finished: Path, tmp_path: Path
) -> None:
    noisy = {"deep": [0.05, -0.06, 0.02], "deep@flops": [0.04, -0.05, 0.03]}
    verdict = reported(entasis, finished, tmp_path / "s", {"slope": [0.0001, 0.0, -0.0001], **noisy})
    arm = verdict["protocols"]["params"]["arms"]["slope"]
    assert arm["difference"]["p_equivalent_holm"] < 0.05
    assert arm["judgement"] == "undecided" and arm["says"].startswith("no difference detected")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every run has a process of its own")
def test_a_run_does_not_inherit_the_memory_of_the_one_before_it(
    entasis: Command, corpus: Path, tmp_path: Path
) -> None:
    """Two arms in turn in one worker: a small one, and one whose batch takes much more."""
    big = {"batch.tokens": 32_768, "batch.micro": 1024}
    base = {"tokens": 32_768, "batch": {"tokens": 2048, "micro": 8}, "evaluation": {"tokens": 1000}}
    file = write(tmp_path, corpus, base=base, arms={"plain": {}, "big": big})
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # so that there is one worker, with one thread
    try:
        code, _, errors = entasis("study", "run", file, "--output", tmp_path / "s")
    finally:
        os.sched_setaffinity(0, cores)
    assert code == 0, errors
    peak = {
        (arm, seed): json.loads((tmp_path / f"s/runs/{arm}/seed-{seed}/result.json").read_text())["peak_memory_bytes"]
        for arm in ("plain", "big")
        for seed in (0, 1)
    }  # fmt: skip
    extra = {seed: peak["big", seed] - peak["plain", seed] for seed in (0, 1)}
    assert extra[0] > 100e6 and extra[1] > 0.8 * extra[0], peak


def test_the_disk_that_runs_take_is_told_before_they_begin(
    entasis: Command, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "s")
    lost = list((tmp_path / "s/runs/slope").glob("seed-*"))
    kept = [run / f"{name}.safetensors" for run in lost for name in ("model", "optimizer")]
    # And once more in the last checkpoint, which in models so small is mostly its own index.
    there = 2 * sum(path.stat().st_size for path in kept)
    for run in lost:
        shutil.rmtree(run)
    # The weights of runs that are finished are not needed.
    for weights in (tmp_path / "s/runs/plain").rglob("model.safetensors"):
        weights.unlink()
    code, out, errors = entasis(
        "study", "plan", tmp_path / "s/study.yaml", "--output", tmp_path / "s", "--json", "--quick"
    )
    assert code == 0, errors
    assert json.loads(out)["disk_bytes"] == pytest.approx(there, rel=0.1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10**5))
    code, out, errors = entasis("study", "resume", tmp_path / "s")
    assert code == 0, errors
    assert f"the {len(lost)} runs that are left take about" in out and "100 kB are free" in out


def test_a_text_that_is_read_again_is_said(entasis: Command, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "s")
    path = tmp_path / "s/runs/slope/seed-1/result.json"
    result = json.loads(path.read_text())
    (corpus,) = result["epochs"]
    code, out, errors = entasis("study", "report", tmp_path / "s", "--json")
    assert code == 0 and "read more than once" not in json.loads(out)["sentence"], errors
    del result[files.SEAL]
    files.write_json(path, result | {"epochs": {corpus: 2.25}})
    code, out, errors = entasis("study", "report", tmp_path / "s", "--json")
    assert code == 0, errors
    assert json.loads(out)["sentence"].endswith(
        "\nA text was read more than once by slope, up to 2.25 times."
    )


def test_a_learning_rate_edited_after_the_runs_is_noticed(
    entasis: Command, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "s")
    path = tmp_path / "s/study.yaml"
    source = yaml.safe_load(path.read_text())
    source["base"]["optimizer"]["lr"] = 4e-3
    path.write_text(yaml.safe_dump(source, sort_keys=False))
    for verb in ("resume", "report"):
        code, _, errors = entasis("study", verb, tmp_path / "s")
        assert code == 2 and "optimizer.lr" in errors and "study.yaml has changed since it ran" in errors
        assert errors.count("\n") == 1


def test_a_number_changed_in_a_result_is_noticed(entasis: Command, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "s")
    path = tmp_path / "s/runs/slope/seed-1/result.json"
    result = json.loads(path.read_text())
    result["validation"]["bits_per_byte"] -= 0.05
    path.write_text(json.dumps(result))
    code, _, errors = entasis("study", "report", tmp_path / "s")
    assert code == 2 and f"damaged: {path} was changed after it was written" in errors
    del result[files.SEAL]
    path.write_text(json.dumps(result))
    code, _, errors = entasis("study", "report", tmp_path / "s")
    assert (
        code == 2
        and f"damaged: {path} says" in errors
        and "the documents in validation.safetensors" in errors
    )


def documents(run: Path) -> set[int]:
    return {int(x) for x in load_file(run / "validation.safetensors")["document_hashes"]}


def test_a_sweep_has_seeds_and_documents_of_its_own_and_no_rate_wins_on_survivors(
    entasis: Command, corpus: Path, tmp_path: Path
) -> None:
    sweep = {"multipliers": [0.5, 1], "seeds": 2, "changes": {"tokens": 1024}}
    file = write(tmp_path, corpus, arms={"plain": {}}, sweep=sweep, base={"evaluation": {}, "tokens": 1024})
    folder = tmp_path / "s"
    code, out, errors = entasis("study", "run", file, "--output", folder, "--json")
    assert code == 0, errors
    tried, main_runs = sorted(folder.glob("sweep/*/*/*/")), sorted(folder.glob("runs/*/*/"))
    assert {p.name for p in tried} == {"seed-1000", "seed-1001"}
    chosen_on, judged_on = documents(tried[0]), documents(main_runs[0])
    assert not chosen_on & judged_on and len(judged_on) == pytest.approx(2 * len(chosen_on), abs=2)
    best = json.loads(out)["protocols"]["params"]["arms"]["plain"]["learning_rate_multiplier"]
    other = {0.5: "1", 1.0: "0.5"}[best]
    set_score(folder / f"sweep/plain/lr-{other}/seed-1000", 0.5)
    (folder / f"sweep/plain/lr-{other}/seed-1001/result.json").unlink()  # as of a run that diverged
    code, out, errors = entasis("study", "report", folder, "--json")
    assert code == 0, errors
    assert json.loads(out)["protocols"]["params"]["arms"]["plain"]["learning_rate_multiplier"] == best
    assert f"Not finished for every seed, so not to be chosen: plain × {other}." in (
        folder / "report.html"
    ).read_text(encoding="utf-8")


def test_a_sweep_on_a_seed_of_the_study_is_refused(entasis: Command, corpus: Path, tmp_path: Path) -> None:
    file = write(tmp_path, corpus, sweep={"multipliers": [0.5, 1], "seeds": [1, 2]})
    code, _, errors = entasis("study", "plan", file)
    assert code == 2 and "sweep.seeds holds 1, a seed of the study too" in errors


def test_a_sweep_needs_documents_to_choose_on(entasis: Command, corpus: Path, tmp_path: Path) -> None:
    command = ["data", "prepare", str(corpus / "text"), "--train-tokenizer", "512", "--validation", "0.01"]
    assert entasis(*command, "--output", tmp_path / "one")[0] == 0
    data = {
        "train": str(tmp_path / "one/train"),
        "validation": str(tmp_path / "one/validation"),
        "sequence": 32,
    }
    file = write(tmp_path, corpus, sweep=[0.5, 1], base={"data": data})
    code, _, errors = entasis("study", "run", file, "--output", tmp_path / "s")
    assert code == 2 and "one document cannot be divided" in errors and not (tmp_path / "s/sweep").exists()


def test_an_arm_without_held_out_text_is_refused(entasis: Command, corpus: Path, tmp_path: Path) -> None:
    file = write(tmp_path, corpus, arms={"plain": {}, "blind": {"data.validation": None}})
    code, _, errors = entasis("study", "plan", file)
    assert code == 2 and "arm blind has no data.validation to be judged on" in errors


@pytest.fixture(scope="module")
def other_tokenizer(corpus: Path) -> Path:
    command = ["data", "prepare", str(corpus / "text"), "--train-tokenizer", "400", "--validation", "0.4"]
    assert main([*command, "--output", str(corpus / "coarse")]) == 0
    return corpus / "coarse"


def test_arms_of_different_tokenizers_are_judged_on_the_same_documents(
    entasis: Command, corpus: Path, other_tokenizer: Path, tmp_path: Path
) -> None:
    data = {
        "data.train": str(other_tokenizer / "train"),
        "data.validation": str(other_tokenizer / "validation"),
    }
    arms = {"plain": {}, "coarse": {**data, "shape.vocabulary": 400}}
    file = write(tmp_path, corpus, arms=arms, base={"evaluation": {"tokens": "60k"}, "tokens": 1024})
    code, out, errors = entasis("study", "run", file, "--output", tmp_path / "s", "--json")
    assert code == 0, errors
    runs = tmp_path / "s/runs"
    chosen = documents(runs / "plain/seed-0")
    assert documents(runs / "coarse/seed-0") == chosen and 1 < len(chosen) < 8
    assert json.loads(out)["protocols"]["params"]["arms"]["coarse"]["difference"]["evaluation_error"] > 0


def test_arms_with_other_held_out_documents_are_refused_before_anything_runs(
    entasis: Command, corpus: Path, tmp_path: Path
) -> None:
    command = ["data", "prepare", str(corpus / "text"), "--train-tokenizer", "400", "--validation", "0.2"]
    assert entasis(*command, "--output", tmp_path / "less")[0] == 0
    data = {"data.train": str(tmp_path / "less/train"), "data.validation": str(tmp_path / "less/validation")}
    arms = {"plain": {}, "less": {**data, "shape.vocabulary": 400}}
    file = write(tmp_path, corpus, arms=arms, base={"evaluation": {}})
    for verb in ("plan", "run"):
        code, _, errors = entasis("study", verb, file, "--output", tmp_path / "s")
        assert code == 2 and "arm less would be judged on" in errors and "of them the same" in errors
    assert not (tmp_path / "s/runs").exists()


def test_keys_may_stand_before_and_behind_options() -> None:
    for words in (["seeds=2", "--size", "nano", "--quick"], ["--size", "nano", "seeds=2", "--quick"]):
        args = parse(["study", "plan", "growth", *words])
        assert (args.set, args.size, args.quick) == (["seeds=2"], "nano", True)
    with pytest.raises(UserError, match="unrecognized arguments: --seeds=2"):
        parse(["study", "plan", "growth", "--seeds=2"])
