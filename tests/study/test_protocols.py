"""A study under all three protocols with a learning-rate sweep, trained for real."""

import csv
import io
import itertools
import json
import os
import shutil
import statistics
from pathlib import Path

import pytest
from rich.console import Console

from entasis.data import tokenizer
from entasis.data.corpus import Corpus
from entasis.data.held_out import choose_documents
from entasis.study import runner, study_files, throughput

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
TASK = """
task: two_ways
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("study")]


def test_params_flops_time_and_a_sweep(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for name in ("argparse", "ast", "difflib", "inspect", "tarfile", "typing"):
        shutil.copy(Path(os.__file__).with_name(f"{name}.py"), text)
    (tmp_path / "tasks").mkdir()
    rows = [
        {"text": f"import {m}\nclass", "choices": [" A:", " def"], "answer": i % 2}
        for i, m in enumerate("abcdef")
    ]
    (tmp_path / "tasks/data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks/two.yaml").write_text(TASK % (tmp_path / "tasks/data.jsonl"))
    study = study_files.from_dict(
        {
            "base": {
                "shape": {"profile": "isotropic", "layers": 4, "d_model": 32, "head_dim": 8, "budget": "90k",
                          "vocabulary": 512, "tied_embeddings": True, "context": 32},
                "data": {"train": "corpora/code/train", "validation": "corpora/code/validation", "sequence": 32},
                "tokens": 4096,
                "batch": {"tokens": 256},
                "optimizer": {"lr": 5e-3},
                "logging": {"tensorboard": False},
                "checkpoint": {"every": None},
                "precision": "fp32",
            },
            "corpora": {"code": {"sources": [str(text)], "train_tokenizer": 512, "validation": 0.5}},
            # More layers, more attention: more FLOPs for the same parameters.
            "arms": {"plain": {}, "deep": {"shape.layers": 8}, "half": {"control": True}},
            "tolerance": "5%",
            "seeds": 1,
            "threads": 1,
            "protocols": ["params", "flops", "time"],
            "hours": 0.0005,
            "downstream": {"tasks": ["two_ways"], "include_path": str(tmp_path / "tasks"),
                           "continuation": {"items": 12, "context": 8, "continuation": 2}},
            "sweep": {"multipliers": [0.1, 1], "changes": {"tokens": 1024}},
        },
        name="s",
    )  # fmt: skip
    folder = tmp_path / "s"
    verdict = runner.run(study, folder, Console(file=io.StringIO(), width=160))
    assert verdict.complete and set(verdict.protocols) == {"params", "flops", "time"}
    results = {
        str(p.parent.relative_to(folder)): json.loads(p.read_text()) for p in folder.rglob("result.json")
    }
    # The sweep: each arm at each rate, and the better rate of each in the main runs.
    sweep = {k: v["validation"]["bits_per_byte"] for k, v in results.items() if k.startswith("sweep/")}
    assert len(sweep) == 4
    for arm in ("plain", "deep"):
        best = min((0.1, 1.0), key=lambda m: sweep[f"sweep/{arm}/lr-{m:g}/seed-1000"])
        assert verdict.protocols["params"].arms[arm].learning_rate_multiplier == best
    flops = {arm: x.training_flops for arm, x in verdict.protocols["flops"].arms.items()}
    batch = 256 * verdict.protocols["flops"].arms["deep"].flops_per_token
    assert abs(flops["deep"] - flops["plain"]) <= batch / 2
    tokens = {p: x.arms["deep"].tokens for p, x in verdict.protocols.items()}
    assert tokens["params"] == 4096 and tokens["flops"] < 4096
    measured = json.loads((folder / "throughput.json").read_text())["tokens_per_second"]
    assert {len(rounds) for arm in measured.values() for rounds in arm} == {throughput.ROUNDS}
    # The geometric mean over all rounds of all workers.
    speed = {
        arm: statistics.geometric_mean(x for rounds in measured[arm] for x in rounds) for arm in measured
    }
    told = verdict.protocols["time"].arms["deep"].throughput
    assert told.tokens_per_second == pytest.approx(speed["deep"]) and told.relative_error > 0
    assert told.slowest < told.fastest and told.rounds == len(measured["deep"]) * throughput.ROUNDS
    base = verdict.protocols["time"].arms["plain"].tokens
    assert base == pytest.approx(1.8 * speed["plain"], abs=128)
    assert tokens["time"] == max(1, round(1.8 * speed["deep"] / 256)) * 256
    # The control under each protocol is what its own runs say.
    for p in verdict.protocols.values():
        half = p.arms["half"]
        assert half.difference.mean == pytest.approx(half.bits_per_byte - p.arms["plain"].bits_per_byte)
    assert verdict.protocols["time"].arms["half"].tokens == pytest.approx(base / 2, abs=128)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Learning rates" in page and "Downstream tasks" in page
    assert "so many bits per byte by the slope" in page
    told = (folder / "tables" / "downstream.csv").read_text()
    assert "two_ways,acc,plain,0." in told and "two_ways,acc,deep,0." in told
    # The task of the study's own text is of the documents that the verdict is on, and none that rates were chosen by.
    corpus = Corpus(folder / "corpora/code/validation")
    reader, offsets = tokenizer.load(corpus.tokenizer_path), corpus.document_offsets()
    documents = [reader.decode(corpus.read(int(a), int(b)).tolist()) for a, b in itertools.pairwise(offsets)]
    chosen = [documents[i] for i in choose_documents(corpus, part="test")]
    assert len(chosen) < len(documents)
    lines = (folder / "tasks/continuation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 12
    assert all(any(row["context"] + row["choices"][row["answer"]] in d for d in chosen) for row in rows)
    table = list(csv.DictReader(io.StringIO(told)))
    asked = {
        (r["protocol"], r["arm"]) for r in table if r["task"] == "continuation" and r["metric"] == "acc_norm"
    }
    assert asked == {(p, arm) for p in ("params", "flops", "time") for arm in ("plain", "deep", "half")}
    for row in table:
        if row["task"] == "continuation" and row["protocol"] == "params":
            score = json.loads((folder / f"runs/{row['arm']}/seed-0/downstream.json").read_text())
            assert float(row["mean"]) == score["continuation"][row["metric"]]
    # A finished study may be asked something else, and trains nothing for it.
    trained = {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")}
    more = study.replaced(downstream=study.downstream.replaced(limit=6, tasks=["two_ways", "two_again"]))
    again = (tmp_path / "tasks/two.yaml").read_text().replace("two_ways", "two_again")
    (tmp_path / "tasks/again.yaml").write_text(again)
    runner.run(more, folder, Console(file=io.StringIO(), width=160))
    assert "two_again,acc,deep,0." in (folder / "tables" / "downstream.csv").read_text()
    assert trained == {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")}
