"""`entasis data prepare` on damaged text: JSON lines, plain or packed, parquet, text files, and tokenizers."""

import gzip
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from driver import NASTY, changed, changes, damaged, damages
from hypothesis import strategies as st

from entasis.data import tokenizer

ROWS = [
    {"text": f"Row {i}: {'words and words ' * (i % 5)}", "n": i, "more": [1, {"a": None}]} for i in range(6)
]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def prepare(fuzz, source, tokenizer="bytes"):
    shutil.rmtree("c", ignore_errors=True)
    return fuzz.command(
        "data",
        "prepare",
        source,
        "--tokenizer",
        tokenizer,
        "--output",
        "c",
        "--validation",
        "0",
        "--seed",
        "1",
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"])
def test_bytes(fuzz, memory, name):
    file = memory / name
    pq.write_table(pa.table({"text": [row["text"] for row in ROWS]}), memory / "b.parquet")
    content = {
        "a.jsonl.gz": gzip.compress(TEXT, mtime=0),
        "a.jsonl.zst": zstandard.compress(TEXT),
        "a.parquet": (memory / "b.parquet").read_bytes(),
    }.get(name, TEXT)

    def check(edits):
        file.write_bytes(damaged(content, edits))
        return prepare(fuzz, file)

    fuzz(damages(within=len(content)), 800, check)
    fuzz.some_accepted()


def test_rows(fuzz, memory):
    file = memory / "a.jsonl"

    def check(edits):
        rows = changed(ROWS, edits)
        lines = [json.dumps(row) for row in rows] if isinstance(rows, list) else [json.dumps(rows)]
        file.write_text("\n".join(lines))
        return prepare(fuzz, file)

    fuzz(changes(["text", "n" * 5000]), 1_500, check)
    fuzz.some_accepted()


@pytest.mark.parametrize("kind", ["values", "bytes"])
def test_tokenizers(fuzz, memory, kind):
    (memory / "a.txt").write_text("some text, and 12 more\n" * 3)
    file = memory / "tokenizer.json"
    tokenizer.train(["some text, and more of it"] * 3, 270).save(file)
    value = json.loads(file.read_text())
    content = file.read_bytes()

    def check(edits):
        file.write_bytes(
            damaged(content, edits) if kind == "bytes" else json.dumps(changed(value, edits)).encode()
        )
        return prepare(fuzz, "a.txt", file)

    words = [
        "BPE",
        "WordPiece",
        "Unigram",
        "WordLevel",
        "ByteLevel",
        "Metaspace",
        "Sequence",
        "Split",
        "(a+)+$",
        "[",
    ]
    strategy = changes(words) if kind == "values" else damages(within=len(content))
    fuzz(strategy, 1_500, check)
    fuzz.some_accepted()


def test_gpt2_files(fuzz, memory):
    (memory / "a.txt").write_text("some text")
    folder = memory / "gpt2"
    folder.mkdir()
    learned = json.loads(tokenizer.train(["some text, and more of it"] * 3, 270).library.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in learned["merges"]]
    vocabulary, lines = learned["vocab"], "\n".join(["#version: 0.2", *merges]).encode()

    def check(given):
        edits, bad = given
        (folder / "vocab.json").write_text(json.dumps(changed(vocabulary, edits)))
        (folder / "merges.txt").write_bytes(damaged(lines, bad))
        return prepare(fuzz, "a.txt", folder)

    one = st.one_of(st.tuples(changes(), st.just([])), st.tuples(st.just([]), damages()))
    fuzz(one, 1_000, check)


def test_arguments(fuzz, memory):
    (memory / "a.jsonl").write_bytes(TEXT)
    options = st.sampled_from(
        ["--validation", "--limit", "--column", "--seed", "--train-tokenizer", "--output"]
    )
    values = st.sampled_from([*(str(v) for v in NASTY), "5%", "1kB", "270", "text", "n", "c", "a.jsonl"])

    def check(given):
        shutil.rmtree("c", ignore_errors=True)
        where = {"--output": "c", "--tokenizer": "bytes", **dict(given)}
        if "/" in where["--output"] or not where["--output"].strip("."):
            where["--output"] = "c"
        if "--train-tokenizer" in where:
            del where["--tokenizer"]
        return fuzz.command("data", "prepare", "a.jsonl", *(f"{k}={v}" for k, v in where.items()))

    fuzz(st.lists(st.tuples(options, values), max_size=4), 1_000, check)
    fuzz.some_accepted()
