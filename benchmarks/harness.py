"""Seconds of lm-eval's harness over our model against lm-eval's own `hf` model, the same weights and task.

    make smollm2 && .venv/bin/python benchmarks/harness.py

SmolLM2-135M (fp32) answers which of four lines of the standard library follows a passage: a local multiple-choice
task. `hf` gets the folder that `entasis export --to hf` writes and a batch of 16, as many contexts as ours reads
together. Alternating; medians. The scores must be equal.
"""

from __future__ import annotations

import json
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import lm_eval
from common import write
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import entasis
from entasis.evaluate import harness
from entasis.interop.exporting import export
from entasis.interop.importing import import_model

SOURCE = Path(__file__).parents[1] / ".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS, ROUNDS = 24, 3
TASK = """
task: next_line
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def main() -> None:
    """Writes and prints benchmarks/results/harness-TIME.json."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        import_model(SOURCE, folder / "ours")
        export(folder / "ours", folder / "hf", to="hf")
        tasks = questions(folder / "tasks")
        ours = entasis.load(folder / "ours")
        theirs = HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=16)
        seconds: dict[str, list[float]] = {"entasis": [], "hf": []}
        scores: dict[str, Any] = {}
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            scores["entasis"] = harness.run(ours, ["next_line"], include_path=str(tasks))["results"]
            seconds["entasis"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            scores["hf"] = lm_eval.simple_evaluate(
                model=theirs,
                tasks=["next_line"],
                task_manager=TaskManager(include_path=str(tasks)),
                bootstrap_iters=1000,
                log_samples=False,
            )["results"]
            seconds["hf"].append(time.perf_counter() - begun)
    accuracy = {who: score["next_line"]["acc,none"] for who, score in scores.items()}
    assert accuracy["entasis"] == accuracy["hf"], accuracy
    medians = {who: statistics.median(values) for who, values in seconds.items()}
    write(
        "harness",
        ["torch", "transformers", "lm_eval"],
        model="SmolLM2-135M-Instruct, fp32",
        questions=QUESTIONS,
        accuracy=accuracy,
        seconds=seconds,
        speedup=medians["hf"] / medians["entasis"],
    )


def questions(folder: Path) -> Path:
    """A folder with the task: twelve lines of source, and four lines of which the first follows."""
    folder.mkdir()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    lines = [x for x in (stdlib / "argparse.py").read_text().splitlines() if len(x) > 20]
    rows = []
    for i in range(QUESTIONS):
        at = 20 + 15 * i
        choices = [lines[at], lines[at + 140], lines[at + 277], lines[at + 390]]
        rows.append({"text": "\n".join(lines[at - 12 : at]) + "\n", "choices": choices, "answer": 0})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "next_line.yaml").write_text(TASK % (folder / "data.jsonl"))
    return folder


if __name__ == "__main__":
    main()
