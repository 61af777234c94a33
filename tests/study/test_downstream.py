"""Tasks of a study, before anything is trained: its own one of held-out text, and what is said without lm-eval."""

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

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
    assert a == {"protocol": "params", "task": "t", "metric": "acc", "arm": "a", "mean": pytest.approx(0.6)}
    # Differences 0.10, 0.12, 0.11: far less spread than the scores. t at 0.975 with two degrees of freedom is 4.303.
    half = 4.303 * 0.01 / 3**0.5
    assert b["difference"] == pytest.approx(0.11)
    assert (b["low"], b["high"]) == (
        pytest.approx(0.11 - half, abs=1e-4),
        pytest.approx(0.11 + half, abs=1e-4),
    )
