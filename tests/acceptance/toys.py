"""Runs in the installed package: makes toy files of every name that the documentation uses, then its commands.

    python -P toys.py STOCK PAGES.json RESULTS.json

Each page runs in an empty folder of its own, in which the toys that a command names are laid before it runs.
"""

import contextlib
import io
import itertools
import json
import os
import shutil
import sys
import sysconfig
import time
import traceback
from pathlib import Path

STDLIB = Path(sysconfig.get_paths()["stdlib"])
FIXED = ["precision=fp32", "attention=sdpa", "compile=false"]
STUDY = """
base:
  shape: {profile: isotropic, layers: 2, d_model: 32, head_dim: 16, tied_embeddings: true, context: 64,
          vocabulary: 512, budget: 100k}
  data: {train: corpora/stdlib/train, validation: corpora/stdlib/validation, sequence: 64}
  batch: {tokens: 512}
  optimizer: {lr: 3e-3}
  evaluation: {tokens: 5k}
  checkpoint: {every: null}
  tokens: 5k
  precision: fp32
  attention: sdpa
  compile: false
arms: {isotropic: {}, crown: {shape.profile: crown}}
baseline: isotropic
protocols: [params]
seeds: 2
threads: 1
"""
TASK = """
task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["yes", "no"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""


def call(argv: list[str]) -> tuple[int, str]:
    """Exit code, and what was said on standard error."""
    from entasis import cli

    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            code = cli.main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Exception:
            code = -1
            said.write(traceback.format_exc())
    return code, said.getvalue()[-2000:]


def must(*argv: str) -> None:
    code, said = call(list(argv))
    assert code == 0, (argv, said)


def lay_in_stock() -> None:
    """Small files of the names in the documentation, in the current folder."""
    import numpy as np

    import entasis

    must(
        "data",
        "prepare",
        "stdlib",
        "--limit",
        "600k",
        "--train-tokenizer",
        "512",
        "--output",
        "corpora/stdlib",
    )
    must("train", "tiny", *toy("entasis train tiny"), "--output", "runs/tiny")
    for name in ("models/SmolLM2-135M", "Llama-3.2-1B"):
        must("export", "runs/tiny", "--to", "padded", "--output", name)
    must("export", "runs/tiny", "--to", "gguf", "--output", "gguf")
    next(Path("gguf").glob("*.gguf")).rename("SmolLM2-135M-Instruct.Q4_1.gguf")
    for name in ("imported/smollm2", "models/smollm2"):
        must("import", "models/SmolLM2-135M", name)
        template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
        Path(name, "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    for folder in ("articles", "books", "TEXT"):
        Path(folder).mkdir()
        for file in sorted(STDLIB.glob("[a-c]*.py"))[:25]:
            shutil.copy(file, Path(folder, file.with_suffix(".txt").name))
    shutil.copy(STDLIB / "ast.py", "book.txt")
    chosen = entasis.load("runs/tiny").tokenizer
    ids = [
        i
        for f in sorted(Path("books").iterdir())
        for i in [*chosen.encode(f.read_text()), chosen.end_of_text]
    ]
    Path("old").mkdir()
    np.array(ids, np.uint16).tofile("old/train.bin")
    np.array(ids, np.uint32).tofile("sick.bin")
    learned = json.loads(Path("runs/tiny/tokenizer.json").read_text())["model"]
    Path("gpt2").mkdir()
    Path("gpt2/vocab.json").write_text(json.dumps({**learned["vocab"], "<|endoftext|>": chosen.end_of_text}))
    merges = (m if isinstance(m, str) else " ".join(m) for m in learned["merges"])
    Path("gpt2/merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    Path("tasks").mkdir()
    Path("tasks/data.jsonl").write_text(
        "".join(json.dumps({"text": f"Is {i} even? "}) + "\n" for i in range(4))
    )
    Path("tasks/my_task.yaml").write_text(TASK % Path("tasks/data.jsonl").resolve())
    for name in ("FILE.yaml", "my-study.yaml"):
        Path(name).write_text(STUDY)
    must("study", "run", "FILE.yaml", "--output", "DIR")


TOYS = {
    "entasis data prepare stdlib": ["--limit", "400k"],
    "entasis data task": ["--items", "10"],
    "entasis study plan where-capacity-belongs": ["--quick"],
    "entasis study plan quickstart": ["--quick"],
    "entasis train": [
        "tokens=4k",
        "batch.tokens=1024",
        "evaluation.tokens=2k",
        "checkpoint.every=null",
        *FIXED,
    ],
    "entasis bench": ["--steps", "2", "batch.tokens=512", *FIXED],
    "entasis anatomy": ["--tokens", "600", "--sequence", "64"],
    "entasis generate": ["--tokens", "4"],
}
BUDGETS = {
    f"studies/{name}": [f"base.shape.budget={budget}", "base.tokens=5k"]
    for name, budget in (("1M", "60k"), ("2M", "100k"), ("4M", "150k"))
}


def toy(command: str) -> list[str]:
    """What makes a command quick: options after its own; the last counts."""
    return next((extra for begin, extra in TOYS.items() if command.startswith(begin)), [])


def supply(stock: Path, argv: list[str]) -> None:
    """Lays the toys that a command reads into the current folder."""
    reads = argv[1:2] if argv[0] == "import" else [b for a, b in itertools.pairwise(argv) if a != "--output"]
    if argv[0] in ("train", "bench", "study"):
        reads.append("corpora/stdlib")
    for name in reads:
        found = next((p for p in (stock / name, *(stock / name).parents) if p != stock and p.is_relative_to(stock)
                      and p.exists()), None) if not name.startswith(("-", "/")) and "{" not in name else None  # fmt: skip
        if found is not None and not Path(name).exists():
            here = Path(found.relative_to(stock))
            here.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if found.is_dir() else shutil.copy)(found, here)


def main(stock: Path, pages: dict[str, list[list[str]]], results: Path) -> None:
    import entasis

    if hasattr(
        os, "sched_setaffinity"
    ):  # on one core a study has one worker: starting a second takes longer than a toy
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    stock.mkdir()
    os.chdir(stock)
    lay_in_stock()
    answers = []
    for page, commands in pages.items():
        folder = stock.parent / "pages" / page.replace("/", "-")
        folder.mkdir(parents=True)
        os.chdir(folder)
        for argv in commands:
            supply(stock, argv)
            # Of a recipe's keys the last counts, wherever it stands; elsewhere they come before `--output`.
            at = argv.index("--output") if "--output" in argv and argv[0] != "train" else len(argv)
            quick = toy(" ".join(["entasis", *argv]))
            if argv[:2] == ["study", "run"] and argv[-1] in BUDGETS:
                quick = BUDGETS[argv[-1]]
            begun = time.perf_counter()
            code, said = call([*argv[:at], *quick, *argv[at:]])
            answers.append(
                {
                    "page": page,
                    "command": " ".join(argv),
                    "code": code,
                    "said": said,
                    "seconds": time.perf_counter() - begun,
                }
            )
    results.write_text(json.dumps({"package": entasis.__file__, "answers": answers}))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]).resolve())
