"""What is left out of a corpus is counted and named, and a source that has changed is noticed."""

import codecs
import gzip
import io
import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from entasis.anatomy.text import read
from entasis.cli import main
from entasis.data import tokenizer
from entasis.data.continuations import texts_of
from entasis.data.corpus import Corpus
from entasis.data.prepare import prepare
from entasis.data.readers import Losses
from entasis.data.sources import TextSources
from entasis.errors import UserError
from entasis.study import runner, study_files


def texts(corpus: Path) -> list[str]:
    """What a corpus of bytes holds, document by document."""
    opened, chosen = Corpus(corpus), tokenizer.from_bytes()
    edges = opened.document_offsets()
    return sorted(chosen.decode(opened.read(a, b - 1)) for a, b in itertools.pairwise(edges))


def command(capsys, *arguments):
    code = main(["data", "prepare", *map(str, arguments), "--tokenizer", "bytes", "--json"])
    caught = capsys.readouterr()
    return code, json.loads(caught.out) if code == 0 else None, caught.err


@pytest.fixture
def stray(tmp_path: Path) -> Path:
    """A folder with two good texts and one file of everything that can be wrong."""
    folder = tmp_path / "stray"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "config").write_text("hidden")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "good.txt").write_text("good")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_text("")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    rows = ['{"text": "row 1"}', '{"text": 3}', "[", '{"txt": "x"}', '{"text": null}', '{"text": "row 6"}']
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "pretty.json.gz").write_bytes(gzip.compress(json.dumps({"text": "x"}, indent=1).encode()))
    (folder / "other.jsonl").write_text('{"txt": "x"}\n{"text": "never looked at"}\n')
    packed = gzip.compress("".join(f'{{"text": "packed {i}"}}\n' for i in range(9_999)).encode())
    (folder / "short.jsonl.gz").write_bytes(packed[:-4_000])
    (folder / "broken.parquet").write_bytes(b"PAR1 nothing")
    pq.write_table(pa.table({"n": [1]}), folder / "numbers.parquet")
    return folder


def test_a_stray_file_kills_no_folder_and_everything_left_out_is_counted(stray, tmp_path, capsys):
    code, result, said = command(capsys, stray, "--validation", "0", "--output", tmp_path / "o")
    assert code == 0
    held = texts(tmp_path / "o" / "train")
    packed = [text for text in held if text.startswith("packed")]
    assert sorted(set(held) - set(packed)) == ["good", "row 1", "row 6"]
    assert len(packed) > 100  # what came before the cut
    left = result["left_out"]
    assert {reason: entry["count"] for reason, entry in left.items()} == {
        "hidden": 2,
        "not UTF-8": 1,
        "empty": 2,
        "unknown suffix": 1,
        "no file, or a broken link": 1,
        "bad row": 2,
        "not lines of JSON": 1,
        "no text under --column": 3,
        "damaged": 2,
    }
    assert left["not UTF-8"]["bytes"] == 4 and left["unknown suffix"]["first"] == ["picture.png"]
    assert left["bad row"]["bytes"] == len('{"text": 3}\n[\n')
    assert left["bad row"]["first"][0] == "rows.jsonl:2 (text is no text)"
    assert all(f"entasis: left out ({reason}): {entry['count']} (" in said for reason, entry in left.items())
    for file in (tmp_path / "o" / "prepared.json", tmp_path / "o" / "train" / "corpus.json"):
        assert json.loads(file.read_text())["left_out"] == left


KINDS = st.sampled_from(["a.txt", "b.md", "c.jsonl", "d.json.gz", "e.parquet", "f.bin", ".g", "h.jsonl.zst"])
CONTENTS = st.one_of(
    st.sampled_from(
        [b"", b"plain", b'{"text": "x"}\n', b'{"text": "x"}\n[', gzip.compress(b'{"text": "x"}')]
    ),
    st.binary(max_size=64),
)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(KINDS, CONTENTS, min_size=1))
def test_no_file_disappears_without_a_word(files):
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        losses = Losses()
        found = {d.name.split(":")[0] for d in TextSources((folder,)).documents(losses)}
        named = " ".join(n for entry in losses.reasons.values() for n in entry["first"])
        assert all(name in found or name in named for name in files)


def test_globs_choose_the_files_of_a_folder(tmp_path, capsys):
    source = tmp_path / "s"
    (source / "vendor").mkdir(parents=True)
    for name in ("main.rs", "vendor/other.rs", "notes.txt", ".hidden.rs"):
        (source / name).write_text(name)
    globs = ["--include", "*.rs", "--exclude", "vendor/*"]
    code, result, _ = command(capsys, source, *globs, "--validation", "0", "--output", tmp_path / "o")
    assert code == 0 and texts(tmp_path / "o" / "train") == ["main.rs"]
    assert result["left_out"]["excluded"]["first"] == ["notes.txt", "vendor/other.rs"]
    none = ["--include", "*.none", "--validation", "0", "--output", tmp_path / "p"]
    code, _, said = command(capsys, source, *none)
    assert code == 2 and "no text in" in said and "excluded: main.rs" in said
    code, _, _ = command(capsys, source, *none[2:])  # nothing had begun there
    assert code == 0
    with pytest.raises(UserError, match=r"prepared with include \['\*\.rs'\], not \[\]"):
        prepare([source], tmp_path / "o", tokenizer="bytes", validation=0, exclude=["vendor/*"])


def test_bytes_that_are_no_text_are_replaced_where_that_is_wanted(tmp_path, capsys):
    source = tmp_path / "s"
    source.mkdir()
    (source / "a.txt").write_bytes(b"caf\xe9")
    (source / "b.jsonl").write_bytes(
        b'{"text": "\xe9t\xe9"}\n{"text": "\\ud800!"}\n{"text": "\\ufffd as is"}\n'
    )
    options = ["--encoding-errors", "replace", "--validation", "0", "--output", tmp_path / "o"]
    code, result, _ = command(capsys, source, *options)
    assert code == 0
    assert texts(tmp_path / "o" / "train") == ["caf\ufffd", "\ufffd as is", "\ufffd!", "\ufffdt\ufffd"]
    assert {reason: e["count"] for reason, e in result["left_out"].items()} == {
        "undecodable bytes replaced": 3
    }


def test_what_is_over_the_limit_and_what_is_alike_is_counted(folder, tmp_path, capsys):
    source = tmp_path / "s"
    shutil.copytree(folder, source)
    shutil.copy(source / "00.txt", source / "copy.txt")
    code, result, _ = command(
        capsys, source, "--limit", "600kB", "--validation", "20%", "--output", tmp_path / "o"
    )
    assert code == 0
    sizes = sum(f.stat().st_size for f in source.iterdir())
    left = result["left_out"]["over --limit"]
    assert left["count"] > 0
    assert left["bytes"] + result["train"]["bytes"] + result["validation"]["bytes"] == sizes
    whole = prepare([source], tmp_path / "whole", tokenizer="bytes", validation=0.2)
    assert whole["near_duplicates"]["first"] == ["00.txt", "copy.txt"]
    with pytest.raises(UserError, match="--limit 10: the first document drawn is larger"):
        prepare([source], tmp_path / "none", tokenizer="bytes", limit=10)


def test_a_limit_that_is_no_size_is_a_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text")
    code, _, said = command(capsys, tmp_path / "a.txt", "--limit", "12XB", "--output", tmp_path / "none")
    assert code == 2 and said == "entasis: --limit is '12XB'; write a size such as 12MB\n"


def test_a_byte_order_mark_is_no_text(tmp_path, capsys):
    source = tmp_path / "s"
    source.mkdir()
    (source / "a.txt").write_bytes(codecs.BOM_UTF8 + "naïve \ufeff".encode())
    (source / "b.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"text": "row"}\n')
    (source / "c.txt").write_bytes(codecs.BOM_UTF8 + b"caf\xe9")
    code, result, said = command(capsys, source, "--validation", "0", "--output", tmp_path / "o")
    assert code == 0 and texts(tmp_path / "o" / "train") == ["naïve \ufeff", "row"]
    assert result["train"]["bytes"] == len("naïve \ufeffrow".encode())
    assert "c.txt (not UTF-8 after about" in said


def test_json_is_read_by_lines_under_each_of_its_names(tmp_path, capsys):
    source = tmp_path / "s"
    source.mkdir()
    for name in ("a.ndjson", "b.json", "c.jsonl"):
        (source / name).write_text(f'{{"body": "of {name}"}}\n{{"body": "again"}}\n')
    (source / "d.ndjson.gz").write_bytes(gzip.compress(b'{"body": "packed"}\n'))
    (source / "e.json").write_text(json.dumps({"body": "x"}, indent=1))
    options = ["--column", "body", "--validation", "0", "--output", tmp_path / "o"]
    code, result, _ = command(capsys, source, *options)
    assert code == 0 and result["left_out"]["not lines of JSON"]["count"] == 1
    read = ["again"] * 3 + ["of a.ndjson", "of b.json", "of c.jsonl", "packed"]
    assert texts(tmp_path / "o" / "train") == read
    for name, content in (("pretty", json.dumps({"text": "x"}, indent=1)), ("list", '[{"text": "x"}]')):
        (tmp_path / f"{name}.json").write_text(content)
        code, _, said = command(capsys, tmp_path / f"{name}.json", "--output", tmp_path / "p")
        assert code == 2 and f"{name}.json:1: not a JSON object with text (" in said
        assert "each line must be an object of its own" in said


def test_a_column_that_no_source_has_is_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("plain")
    code, _, said = command(capsys, tmp_path / "a.txt", "--column", "body", "--output", tmp_path / "o")
    assert code == 2 and said.startswith("entasis: --column body: no source has columns; jsonl, parquet")


def test_values_of_a_parquet_column_are_text_or_left_out(tmp_path, capsys):
    source = tmp_path / "s"
    source.mkdir()
    pq.write_table(pa.table({"text": [b"caf\xc3\xa9", None, b"\xff"]}), source / "bytes.parquet")
    pq.write_table(pa.table({"text": [{"a": 1}, {"a": 2}]}), source / "maps.parquet")
    options = ["--validation", "0", "--output"]
    code, result, _ = command(capsys, source, *options, tmp_path / "o")
    assert code == 0 and texts(tmp_path / "o" / "train") == ["café"]
    left = result["left_out"]
    assert {reason: entry["count"] for reason, entry in left.items()} == {
        "empty": 1,
        "not UTF-8": 1,
        "bad row": 2,
    }
    assert left["bad row"]["first"][0] == "maps.parquet:1 (text is no text (dict))"
    assert left["not UTF-8"]["bytes"] == 1
    code, _, said = command(capsys, source / "maps.parquet", *options, tmp_path / "p")
    assert code == 2 and "maps.parquet:1: text is no text (dict)" in said
    code, _, _ = command(capsys, source, "--encoding-errors", "replace", *options, tmp_path / "q")
    assert code == 0 and texts(tmp_path / "q" / "train") == ["café", "\ufffd"]


def test_folders_and_files_that_may_not_be_read_are_counted(tmp_path, monkeypatch, capsys):
    source = tmp_path / "s"
    for name in ("closed", "listed", "open"):
        (source / name).mkdir(parents=True)
        (source / name / "a.txt").write_text(name)
    scan, status = os.scandir, Path.stat

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    def stat(path, **options):
        if path.parent.name == "listed":
            raise PermissionError(13, "Permission denied", str(path))
        return status(path, **options)

    monkeypatch.setattr(os, "scandir", scandir)  # root, as whom tests may run, may read everything
    monkeypatch.setattr(Path, "stat", stat)
    code, result, _ = command(capsys, source, "--validation", "0", "--output", tmp_path / "o")
    monkeypatch.undo()
    assert code == 0 and texts(tmp_path / "o" / "train") == ["open"]
    assert result["left_out"]["may not be read"]["first"] == ["closed", "listed/a.txt"]


def test_changed_sources_are_noticed_and_prepared_anew_beside(tmp_path, capsys):
    source, output = tmp_path / "s", tmp_path / "o"
    source.mkdir()
    for name in ("a.txt", "b.txt"):
        (source / name).write_text(f"text of {name}")
    options = [source, "--validation", "0", "--output", output]
    _, first, said = command(capsys, *options)
    assert first["output"] == str(output) and "changed" not in said
    (source / "a.txt").write_text("text of A.txt")  # as long as before
    (source / "b.txt").unlink()
    (source / "c.txt").write_text("new")
    code, second, said = command(capsys, *options)
    assert code == 0 and second["output"] == f"{output}-2"
    assert f"{output}: its sources have changed since (1 changed: {source / 'a.txt'}, 1 new: " in said
    assert f"1 gone: {source / 'b.txt'}); prepared anew in {output}-2" in said
    assert texts(output / "train") == ["text of a.txt", "text of b.txt"]
    assert texts(Path(f"{output}-2") / "train") == ["new", "text of A.txt"]
    prepared = Path(f"{output}-2", "prepared.json")
    before = prepared.stat().st_mtime_ns
    _, third, said = command(capsys, *options)
    assert third["train"] == second["train"] and prepared.stat().st_mtime_ns == before
    assert f"{output}-2 is the corpus of what they are now" in said


def test_sources_that_change_before_it_is_finished_begin_it_again(folder, tmp_path, monkeypatch, capsys):
    source, output = tmp_path / "s", tmp_path / "o"
    shutil.copytree(folder, source)
    written = tokenizer.Tokenizer.save

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer.Tokenizer, "save", die)
    with pytest.raises(KeyboardInterrupt):
        prepare([source], output, tokenizer="bytes", validation=0)
    monkeypatch.setattr(tokenizer.Tokenizer, "save", written)
    (source / "00.txt").write_text("another text")
    code, result, said = command(capsys, source, "--validation", "0", "--output", output)
    assert code == 0 and result["output"] == str(output)
    assert (
        f"its sources changed before it was finished (1 changed: {source / '00.txt'}); it begins again"
        in said
    )
    assert "another text" in texts(output / "train")


def test_another_tokenizer_under_the_same_name_is_noticed(folder, tmp_path, trained, large):
    trained.save(tmp_path / "t.json")
    prepare([folder], tmp_path / "o", tokenizer=tmp_path / "t.json", validation=0)
    large.save(tmp_path / "t.json")
    again = prepare([folder], tmp_path / "o", tokenizer=tmp_path / "t.json", validation=0)
    assert again["tokenizer"] == large.hash and "tokenizer" in again["note"]


def test_a_data_set_is_streamed_from_a_local_copy(tmp_path, capsys, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    local = tmp_path / "set"
    local.mkdir()
    rows = [{"text": "first"}, {"text": ""}, {"text": None}, {"text": "fourth"}]
    (local / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (local / "test.jsonl").write_text('{"text": "of the test"}\n')
    code, result, _ = command(capsys, f"hf:{local}", "--validation", "0", "--output", tmp_path / "o")
    assert code == 0 and texts(tmp_path / "o" / "train") == ["first", "fourth"]
    assert result["left_out"]["empty"]["count"] == 2
    code, _, _ = command(capsys, f"hf:{local}::test", "--validation", "0", "--output", tmp_path / "p")
    assert code == 0 and texts(tmp_path / "p" / "train") == ["of the test"]
    code, _, said = command(capsys, f"hf:{local}", "--column", "body", "--output", tmp_path / "q")
    assert code == 2 and "no column 'body', it has text" in said


@pytest.fixture
def latin(tmp_path: Path) -> Path:
    """A folder with three texts of modules, and one that is not UTF-8."""
    folder = tmp_path / "latin"
    folder.mkdir()
    for name in ("bisect", "heapq", "queue"):
        shutil.copy(Path(shutil.__file__).with_name(f"{name}.py"), folder)
    (folder / "cafe.txt").write_bytes(b"caf\xe9")
    return folder


LATIN = "left out (not UTF-8): 1 (4 bytes): cafe.txt"


def test_a_study_says_on_its_console_what_its_corpora_leave_out(latin, tmp_path):
    corpus = {"sources": [str(latin)], "tokenizer": "bytes", "validation": 0.3}
    study = study_files.from_dict(
        {
            "base": {
                "shape": {"profile": "isotropic", "layers": 2, "d_model": 32, "head_dim": 8},
                "data": {"train": "corpora/c/train", "validation": "corpora/c/validation", "sequence": 32},
                "tokens": 1024,
            },
            "arms": {"a": {}, "b": {"optimizer.lr": 1e-3}},
            "corpora": {"c": corpus},
        },
        name="s",
    )
    out = io.StringIO()
    runner._prepare(study, tmp_path / "s", Console(file=out, width=40))
    (line,) = [line for line in out.getvalue().splitlines() if "left out" in line]
    assert line.startswith(f"corpus c: {LATIN} (not UTF-8 after ")


def test_a_task_and_a_text_to_dissect_say_on_stderr_what_they_leave_out(latin, capsys):
    assert len(list(texts_of(latin))) == 3
    assert LATIN in capsys.readouterr().err
    read(latin, tokenizer.from_bytes(), tokens=1000, sequence=32)
    said = capsys.readouterr()
    assert LATIN in said.err and not said.out
    read(["one text", "another"], tokenizer.from_bytes(), tokens=1000, sequence=32)
    assert not capsys.readouterr().err
