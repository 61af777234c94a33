"""Tasks of a study, before anything is trained: its own one of held-out text, and what is said without lm-eval."""

import io
import json
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import entasis.evaluate
from entasis.data.prepare import prepare
from entasis.errors import UserError
from entasis.study import downstream, study_files
from entasis.study.arms import Findings
from entasis.study.config import Study
from entasis.study.executors import local
from entasis.study.plan import lay_out, solve
from entasis.study.results import Outcome


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "text").mkdir()
    for name in ("bisect", "heapq", "queue", "shlex", "textwrap"):
        shutil.copy(Path(os.__file__).with_name(f"{name}.py"), folder / "text")
    prepare([folder / "text"], folder / "corpora", tokenizer="bytes", validation=0.6)
    return folder


def study(folder: Path, wanted: dict[str, Any], context: int = 128) -> Study:
    shape = {"profile": "isotropic", "layers": 2, "d_model": 32, "head_dim": 8, "budget": "60k", "vocabulary": 257,
             "context": context}  # fmt: skip
    data = {name: str(folder / "corpora" / name) for name in ("train", "validation")}
    base = {"shape": shape, "data": {**data, "sequence": 32}, "tokens": 1024, "batch": {"tokens": 256}}
    return study_files.from_dict(
        {"base": base, "arms": {"a": {}, "b": {"shape.profile": "crown"}}, "downstream": wanted}, name="s"
    )


def prepared(corpus: Path, folder: Path, wanted: dict[str, Any], **shape: Any) -> str:
    """What is said of the tasks."""
    said = io.StringIO()
    asked = study(corpus, wanted, **shape)
    downstream.prepare(asked, folder, solve(asked, 257), Console(file=said, width=200))
    return said.getvalue()


def test_the_task_is_made_once_and_again_where_the_folder_was_moved(corpus, tmp_path):
    wanted = {"continuation": {"items": 20, "context": 8, "continuation": 3}}
    assert not prepared(corpus, tmp_path / "s", wanted)
    lines = (tmp_path / "s/tasks/continuation.jsonl").read_text()
    assert len(lines.splitlines()) == 20 and len(json.loads(lines.splitlines()[0])["choices"]) == 4
    (tmp_path / "s").rename(tmp_path / "moved")
    prepared(corpus, tmp_path / "moved", wanted)
    assert (tmp_path / "moved/tasks/continuation.jsonl").read_text() == lines
    assert str(tmp_path / "moved") in (tmp_path / "moved/tasks/continuation.yaml").read_text()


def test_text_that_is_too_short_and_continuations_that_are_too_long_are_refused(corpus, tmp_path):
    with pytest.raises(UserError, match=r"study s: downstream.continuation: .* has room for \d+ items of 40"):
        prepared(corpus, tmp_path / "s", {"continuation": {"items": 100_000}})
    wanted = {"continuation": {"items": 20, "context": 8, "continuation": 6}}
    with pytest.raises(
        UserError, match=r"a continuation has \d+ tokens, the context of arm a 32; ask for fewer"
    ):
        prepared(corpus, tmp_path / "s", wanted, context=32)


def test_without_lm_eval_it_is_said_before_training_and_nothing_is_scored(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    wanted = {"continuation": {"items": 20, "context": 8, "continuation": 3}}
    said = prepared(corpus, tmp_path, wanted)
    assert said.startswith("downstream: left out. Tasks need lm-eval (pip install 'entasis[eval]')")
    with local.pool_of(local.places(1)) as pool:
        assert not downstream.score(study(corpus, wanted), tmp_path, [], Console(file=io.StringIO()), pool)


def test_what_is_asked_otherwise_than_before_is_asked_again_of_all_runs(corpus, tmp_path, monkeypatch):
    """A stand-in for lm-eval says how often it was asked a task."""
    asked: list[tuple[str, tuple[str, ...]]] = []

    def answer(run, tasks, include_path, limit):
        asked.append((run.name, tuple(tasks)))
        return {"results": {task: {"acc,none": float(len(asked))} for task in tasks}}

    monkeypatch.setattr(entasis.evaluate, "harness", types.SimpleNamespace(run=answer), raising=False)
    monkeypatch.setattr("entasis.evaluate.loading.load", lambda run, device: run)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    # In this process.
    monkeypatch.setattr(downstream.launchers, "share", lambda pool, name, f, *given, told: f(*given))
    own = tmp_path / "own"
    own.mkdir()
    (own / "one.yaml").write_text("task: one\ndataset_kwargs: {data_files: {test: my items.jsonl}}\n")
    (own / "two.yaml").write_text("task: two\ndoc_to_text: !function way.text\n")
    (own / "way.py").write_text("text = str\n")
    (own / "my items.jsonl").write_text("{}\n")

    def score(*runs: str, **wanted: Any) -> list[tuple[str, tuple[str, ...]]]:
        asked.clear()
        for name in runs:
            (tmp_path / name).mkdir(exist_ok=True)
        done = [Outcome(None, tmp_path / name, {}) for name in runs]
        study_ = study(corpus, {"tasks": ["one"], "include_path": str(own), "limit": 5, **wanted})
        downstream.score(study_, tmp_path, done, Console(file=io.StringIO()), None)
        return list(asked)

    assert score("a") == [("a", ("one",))]
    assert score("a") == []
    assert score("a", tasks=["one", "two"]) == [("a", ("two",))]
    assert score("a", "b", limit=9) == [("a", ("one",)), ("b", ("one",))]
    assert "two" not in json.loads((tmp_path / "a" / downstream.FILE).read_text())
    (own / "way.py").write_text("text = repr\n")
    assert score("a", limit=9) == []
    (own / "my items.jsonl").write_text("{}\n{}\n")
    assert score("a", "b", limit=9) == [("a", ("one",)), ("b", ("one",))]
    assert score("a", limit=9, tasks=["two"]) == [("a", ("two",))]
    (own / "way.py").write_text("text = str\n")
    assert score("a", limit=9, tasks=["two"]) == [("a", ("two",))]


def scored(corpus, folder, scores):
    """The rows of arms a and b with these accuracies, seed by seed."""
    asked = study(corpus, {"tasks": ["t"]}).replaced(seeds=list(range(len(scores["a"]))))
    plan = lay_out(asked, solve(asked, 257), Findings())
    done = {}
    for arm, runs in plan.grid["params"].items():
        for run, score in zip(runs, scores[arm], strict=True):
            (folder / run.folder).mkdir(parents=True)
            told = {"t": {"acc": score}, "group": {}}
            (folder / run.folder / downstream.FILE).write_text(json.dumps(told))
            done[run.folder] = Outcome(run, folder / run.folder, {})
    return downstream.table(plan, done, "a").rows


def test_seeds_that_agree_to_the_last_item_have_no_interval(corpus, tmp_path):
    _, b = scored(corpus, tmp_path, {"a": [0.5, 0.75], "b": [0.625, 0.875]})
    assert b["difference"] == 0.125 and "low" not in b and "high" not in b


def test_the_table_pairs_scores_by_seed(corpus, tmp_path):
    a, b = scored(corpus, tmp_path, {"a": [0.5, 0.7, 0.6], "b": [0.6, 0.82, 0.71]})
    mean = {"mean": pytest.approx(0.6), "seeds": 3}
    assert a == {"protocol": "params", "task": "t", "metric": "acc", "arm": "a", **mean}
    # Differences 0.10, 0.12, 0.11: far less spread than the scores. t at 0.975 with two degrees of freedom is 4.303.
    half = 4.303 * 0.01 / 3**0.5
    assert b["difference"] == pytest.approx(0.11)
    assert (b["low"], b["high"]) == (
        pytest.approx(0.11 - half, abs=1e-4),
        pytest.approx(0.11 + half, abs=1e-4),
    )
