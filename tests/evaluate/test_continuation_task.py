"""`entasis data task`: a multiple-choice task of held-out text, answered by models that know it and that do not."""

import json
import shutil
import sysconfig
from pathlib import Path

import pytest
from scipy import stats

from entasis import cli

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
STDLIB = Path(sysconfig.get_paths()["stdlib"])
NAMES = ["bisect", "contextlib", "heapq", "queue", "shlex", "textwrap"]
RECIPE = """
shape: {profile: isotropic, layers: 2, d_model: 128, head_dim: 32, budget: 450k, context: 128, tied_embeddings: true}
data: {train: known/train, sequence: 64}
batch: {tokens: 384}
optimizer: {weight_decay: 0.0}
schedule: {warmup: 1}
precision: fp32
attention: sdpa
compile: false
checkpoint: {every: null}
logging: {tensorboard: false}
"""


def asked(capsys, *arguments) -> dict:
    assert cli.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def text(tmp_path, monkeypatch, capsys) -> Path:
    """A folder of files, and a corpus of all of them."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "files"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(STDLIB / f"{name}.py", folder)
    asked(
        capsys, "data", "prepare", folder, "--train-tokenizer", 600, "--validation", "0", "--output", "text"
    )
    return folder


def test_items_are_of_the_text_and_none_repeats(text, capsys):
    made = asked(capsys, "data", "task", "text/train", "--items", 60, "--output", "tasks")
    assert made["items"] == 60 <= made["possible_items"] and made["documents"] == len(NAMES)
    rows = [json.loads(line) for line in Path("tasks/continuation.jsonl").read_text().splitlines()]
    files = {path.name: path.read_text() for path in text.iterdir()}
    whole = [row["context"] + row["choices"][row["answer"]] for row in rows]
    assert len(set(whole)) == len({row["context"] for row in rows}) == 60
    for row, right in zip(rows, whole, strict=True):
        (name,) = [n for n, content in files.items() if right in content]
        assert len(row["context"].split()) == 40
        assert [len(choice.split()) for choice in row["choices"]] == [10] * 4 and len(
            set(row["choices"])
        ) == 4
        for i, choice in enumerate(row["choices"]):
            elsewhere = [n for n, content in files.items() if choice.strip() in content]
            assert elsewhere == [name] if i == row["answer"] else elsewhere and name not in elsewhere
    assert stats.chisquare([sum(r["answer"] == i for r in rows) for i in range(4)]).pvalue > 0.001
    # The same again from the files themselves, and by another seed others.
    again = asked(capsys, "data", "task", text, "--items", 60, "--output", "again")
    assert (
        Path("again/continuation.jsonl").read_text()
        == "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        and again["possible_items"] == made["possible_items"]
    )
    assert (
        cli.main(
            ["data", "task", "text/train", "--items", "60", "--output", "again", "--seed", "1", "--json"]
        )
        == 2
    )
    assert "holds other items already" in capsys.readouterr().err


def test_beside_one_long_document_wrong_answers_are_not_always_the_same(text, capsys):
    long, short = text / "long.py", text / "short.txt"
    for path in text.iterdir():
        if path.name != "contextlib.py":
            path.unlink()
    (text / "contextlib.py").rename(long)
    short.write_text("".join(f"word{i} " for i in range(150)))
    made = asked(capsys, "data", "task", text, "--items", 30, "--output", "tasks")
    assert made["documents"] == 2
    rows = [json.loads(line) for line in Path("tasks/continuation.jsonl").read_text().splitlines()]
    wrong = {choice.strip() for row in rows for i, choice in enumerate(row["choices"]) if i != row["answer"]}
    assert len(wrong) > 20


def test_the_column_of_a_text_in_rows_is_told(text, capsys):
    rows = [{"body": path.read_text()} for path in sorted(text.iterdir())]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["data", "task", "a.jsonl", "--items", "20", "--output", "tasks"]
    assert cli.main(command) == 2 and "name the right one with --column" in capsys.readouterr().err
    assert asked(capsys, *command, "--column", "body")["documents"] == len(NAMES)


def test_text_that_is_too_short_is_refused(text, capsys):
    short = text / "bisect.py"
    assert cli.main(["data", "task", str(short), "--output", "tasks"]) == 2
    assert f"{short}: has room for " in (said := capsys.readouterr().err) and "200 are asked for" in said
    Path("few.txt").write_text("a few words only")
    assert cli.main(["data", "task", "few.txt", "--items", "1", "--output", "tasks"]) == 2
    assert "has room for 0 items of 40 + 10" in capsys.readouterr().err and not Path("tasks").exists()


@pytest.mark.slow
def test_who_has_read_the_text_knows_it_and_who_has_not_guesses(text, capsys):
    """The one that has read it has learned 10 kB by heart."""
    little = Path("little")
    little.mkdir()
    for name in ("bisect", "heapq", "textwrap"):
        (little / f"{name}.py").write_text((text / f"{name}.py").read_text()[:3500])
    Path("recipe.yaml").write_text(RECIPE)
    asked(capsys, "data", "prepare", little, "--train-tokenizer", 400, "--validation", 0, "--output", "known")
    task = ["--items", 40, "--context", 15, "--continuation", 6]
    asked(capsys, "data", "task", "known/train", *task, "--output", "tasks")
    right = {}
    for name, tokens, rate in (("untrained", 384, 0.0), ("trained", 120_000, 3e-3)):
        asked(capsys, "train", "recipe.yaml", f"tokens={tokens}", f"optimizer.lr={rate}", "--output", name)
        found = asked(capsys, "evaluate", name, "--tasks", "continuation", "--include-path", "tasks")
        scores = found["lm_eval"]["results"]["continuation"]
        right[name] = [round(scores[f"{metric},none"] * 40) for metric in ("acc", "acc_norm")]
    low, high = stats.binom.ppf([0.0005, 0.9995], 40, 0.25)
    assert all(low <= n <= high for n in right["untrained"]), right
    assert all(stats.binom.sf(n - 1, 40, 0.25) < 1e-7 for n in right["trained"]), right
