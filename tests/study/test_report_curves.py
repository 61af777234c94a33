"""The curves of a study's page, of runs whose metrics are planted: at which FLOPs they are drawn, and their differences."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from entasis.study import analysis, plan, report, study_files
from entasis.study.arms import Findings

LAYERS = [{"n_heads": 4, "n_kv_heads": 4, "d_ff": 64}] * 4
BATCH = 100


def study(**changes: Any):
    return study_files.from_dict({
        "base": {
            "shape": {"layers": LAYERS, "d_model": 32, "head_dim": 8, "vocabulary": 512, "context": 20,
                      "tied_embeddings": True},
            "data": {"train": "corpora/code/train", "validation": "corpora/code/validation", "sequence": 20},
            "tokens": 30_000, "batch": {"tokens": BATCH},
        },
        "arms": {"plain": {}, "other": {}}, "seeds": 1, "protocols": ["unmatched"], **changes,
    }, name="s")  # fmt: skip


def page_of(folder: Path, runs: dict[str, dict[str, Any]], finished: int = 9, **changes: Any) -> str:
    """The page of a study whose runs, those of the first so many seeds, left these losses and results."""
    made = study(**changes)
    laid = plan.lay_out(made, plan.solve(made, 512), Findings())
    for run in (run for run in laid.runs if run.seed < finished):
        path = folder / run.folder
        path.mkdir(parents=True)
        planted = dict(runs[run.arm])
        losses = planted.pop("losses")
        numbers = planted.pop("numbers", [0] * len(losses))
        rows = [
            {"stage": number, "tokens": BATCH * (i + 1), "loss": loss, "seconds": 1.0}
            for i, (number, loss) in enumerate(zip(numbers, losses, strict=True))
        ]
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = {
            "tokens": BATCH * len(losses), "flops_per_token": 10, "loss": 1.0, "seconds": 1.0, "parameters": 1,
            "tokens_per_second": 1.0, "peak_memory_bytes": 1, "validation": {"bits_per_byte": 1.0, "tokens": 8, "bytes": 8},
        }  # fmt: skip
        (path / "result.json").write_text(json.dumps(result | planted))
        told = {
            "device": "cpu",
            "threads": 1,
            "precision": "fp32",
            "compile": False,
            "platform": "",
            "versions": {},
        }
        (path / "environment.json").write_text(json.dumps({**told, "data": {}}))
        arrays = {"document_nll": np.full(2, 4 * np.log(2)), "document_bytes": np.full(2, 4)}
        save_file(arrays, path / "validation.safetensors")
    report.write(made, laid, folder, analysis.judge(made, laid, folder))
    return (folder / "report.html").read_text(encoding="utf-8")


def drawn(folder: Path, runs: dict[str, dict[str, Any]], **changes: Any) -> tuple[list[dict], list[dict]]:
    """(the curves, the differences) on that page."""
    found = re.search(r'id="datasets">(.*?)</script>', page_of(folder, runs, **changes), re.S)
    assert found is not None
    data = [rows for rows in json.loads(found[1]).values() if rows]
    return tuple(next(rows for rows in data if key in rows[0]) for key in ("flops", "gap"))  # type: ignore[return-value]


def test_each_stage_is_drawn_at_its_own_price(tmp_path: Path) -> None:
    """A cheap stage, a measurement, and a dear stage that is three times as long."""
    staged = {
        "losses": [1.0] * 40,
        "numbers": [0] * 10 + [1] * 30,
        "flops_per_token": 16,
        "stages": [{"tokens": 1000, "flops_per_token": 4, "bits_per_byte": None},
                   {"tokens": 3000, "flops_per_token": 20, "bits_per_byte": 1.0}],
        "importance": {"layers": [[1.0] * 4], "flops": 500.0},
    }  # fmt: skip
    curves, _ = drawn(tmp_path, {"plain": {"losses": [1.0] * 40}, "other": staged})
    flops = {row["tokens"]: row["flops"] for row in curves if row["arm"] == "other"}
    assert (flops[500], flops[1000]) == (2000, 4000)
    assert (flops[1100], flops[4000]) == (4500 + 2000, 4500 + 60_000)
    flops = {row["tokens"]: row["flops"] for row in curves if row["arm"] == "plain"}
    assert (flops[500], flops[4000]) == (5000, 40_000)


@pytest.mark.parametrize("steps", [300, 331, 77])
def test_differences_are_of_the_same_steps(steps: int, tmp_path: Path) -> None:
    """Runs that lose the same at every step do not differ, however long they are."""
    losses = [10 / (1 + i) for i in range(400)]
    _, gaps = drawn(tmp_path, {"plain": {"losses": losses[:300]}, "other": {"losses": losses[:steps]}})
    assert {row["gap"] for row in gaps} == {0.0}
    assert gaps[-1]["tokens"] == BATCH * min(300, steps) and gaps[-1]["place"] == 1.0


def test_differences_step_by_step_are_of_runs_that_read_the_same(tmp_path: Path) -> None:
    two = {f"data.train.{name}": {"path": f"corpora/{name}/train", "weight": 1} for name in ("code", "prose")}
    halves = [{"tokens": 10_000}, {"tokens": 20_000}]
    arms = {
        "plain": {},
        "faster": {"optimizer.lr": 1e-3},
        "staged": {"stages": halves},
        "batch": {"batch.tokens": 200},
        "mixed": two,
        "later": {"stages": [halves[0], {**halves[1], "data": {"train": "corpora/prose/train"}}]},
        "on": {"start": {"from": {"trunk": "small"}}},
        "again": {"start": {"from": {"trunk": "small"}, "data_position": "reset"}},
    }
    stages = [{"tokens": 1000, "flops_per_token": 1, "bits_per_byte": 1.0}] * 2
    runs = {name: {"losses": [1.0] * 20} for name in arms}
    runs |= {name: {"losses": [1.0] * 20, "stages": stages} for name in ("staged", "later")}
    changes = {"arms": arms, "trunks": {"small": {}}}
    _, gaps = drawn(tmp_path / "a", runs, **changes)
    assert {row["arm"] for row in gaps} == {"faster", "staged", "again"}
    said = "in other batches or from another place: batch, mixed, later, on."
    assert said in (tmp_path / "a/report.html").read_text()
    # From one trunk, all read on from the same place; a mixture of several stages takes turns anew in each.
    base = {**study().base, "start": {"from": {"trunk": "small"}}, "data": {"validation": "v", "sequence": 20, "train": {
        name: {"path": f"corpora/{name}/train", "weight": 1} for name in ("code", "prose")}}}  # fmt: skip
    arms = {name: arms[name] for name in ("plain", "faster", "staged")}
    _, gaps = drawn(tmp_path / "b", runs, **{**changes, "arms": arms, "base": base})
    assert {row["arm"] for row in gaps} == {"faster"}


ALONE = "With one seed there is no interval"


def test_the_noise_is_of_the_pairs_that_there_are(tmp_path: Path) -> None:
    runs = {"plain": {"losses": [1.0] * 20}, "other": {"losses": [1.0] * 20}}
    arms = {"plain": {}, "other": {"optimizer.lr": 1e-3}}
    page = page_of(tmp_path / "three", runs, finished=3, seeds=8, arms=arms)
    assert "With 3 pairs and 1 comparison (Holm)" in page and ALONE not in page
    assert ALONE in page_of(tmp_path / "one", runs, seeds=1, arms=arms)
    assert ALONE not in page_of(tmp_path / "none", runs, finished=0, seeds=1, arms=arms)
    control = {"plain": {}, "other": {"control": True}}
    assert ALONE not in page_of(tmp_path / "control", runs, seeds=3, arms=control)
