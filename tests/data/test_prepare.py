"""From text to corpus and back."""

import gzip
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from entasis.data import dedup, tokenizer
from entasis.data import prepare as preparing
from entasis.data.corpus import Corpus
from entasis.data.dataset import TokenDataset
from entasis.data.prepare import prepare
from entasis.data.shards import open_shard, write_shard
from entasis.errors import UserError


def decoded(corpus):
    chosen = tokenizer.load(corpus.tokenizer_path)
    offsets = corpus.document_offsets()
    return [chosen.decode(corpus.read(int(a), int(b) - 1)) for a, b in itertools.pairwise(offsets)]


def test_every_text_comes_back_on_one_side_with_its_bytes(corpus, texts):
    train, held_out = Corpus(corpus / "train"), Corpus(corpus / "validation")
    assert len(train.shards) > 1
    assert sorted(decoded(train) + decoded(held_out)) == sorted(texts)
    for side in (train, held_out):
        sizes = [len(t.encode("utf-8")) for t in decoded(side)]
        assert side.document_bytes().tolist() == sizes
        assert side.bytes == sum(sizes)
    assert 0 < held_out.bytes <= 0.2 * (held_out.bytes + train.bytes)


def test_windows_cover_the_corpus_and_share_one_token(corpus):
    whole = Corpus(corpus / "train")
    dataset = TokenDataset(whole, 64)
    rows = dataset.batch(np.arange(len(dataset)))
    stream = whole.read(0, whole.tokens)
    assert np.array_equal(rows[:, :-1].ravel(), stream[: rows[:, :-1].size])
    assert np.array_equal(rows[:-1, -1], rows[1:, 0])
    ids = dataset.document_ids(np.arange(len(dataset)))
    ends = stream[: ids[:, :-1].size].reshape(ids[:, :-1].shape) == whole.end_of_text
    assert np.array_equal(np.diff(ids, axis=1) == 1, ends[:, : ids.shape[1] - 1])


def test_it_is_the_same_each_time_and_a_second_call_answers(folder, tmp_path):
    one = prepare([folder], tmp_path / "a", train_tokenizer=600, validation=0.2)
    two = prepare([folder], tmp_path / "b", train_tokenizer=600, validation=0.2)
    assert one["train"]["fingerprint"] == two["train"]["fingerprint"]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    assert prepare([folder], tmp_path / "a", train_tokenizer=600, validation=0.2) == one
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    with pytest.raises(UserError, match="train_tokenizer 600, not 700"):
        prepare([folder], tmp_path / "a", train_tokenizer=700, validation=0.2)


@pytest.mark.parametrize("shards_before", [1, 3, 6])
def test_killed_in_the_middle_it_goes_on_and_ends_the_same(folder, tmp_path, monkeypatch, shards_before):
    whole = prepare([folder], tmp_path / "whole", train_tokenizer=600, validation=0.2, shard_tokens=9_000)
    written = []

    def write_and_die(path, *arguments, **options):
        if len(written) == shards_before:
            path.with_name(path.name + ".partial").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        return write_shard(path, *arguments, **options)

    monkeypatch.setattr(preparing, "write_shard", write_and_die)
    with pytest.raises(KeyboardInterrupt):
        prepare([folder], tmp_path / "cut", train_tokenizer=600, validation=0.2, shard_tokens=9_000)
    with pytest.raises(UserError, match="no corpus here"):
        Corpus(tmp_path / "cut" / "train")
    again = []
    monkeypatch.setattr(
        preparing, "write_shard", lambda path, *a, **k: again.append(path) or write_shard(path, *a, **k)
    )
    resumed = prepare([folder], tmp_path / "cut", train_tokenizer=600, validation=0.2, shard_tokens=9_000)
    assert len(again) == whole["train"]["shards"] + whole["validation"]["shards"] - shards_before
    for side in ("train", "validation"):
        assert resumed[side] == whole[side]
    assert not list((tmp_path / "cut").rglob("*.partial"))


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing(folder, tmp_path):
    command = [sys.executable, "-m", "entasis", "data", "prepare", str(folder), "--train-tokenizer", "600"]
    whole = prepare([folder], tmp_path / "whole", train_tokenizer=600)
    output = tmp_path / "killed"
    for delay in (0.3, 0.5, 0.7, 0.9):
        child = subprocess.Popen(
            [*command, "--output", str(output)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert subprocess.run([*command, "--output", str(output)], capture_output=True).returncode == 0
    assert Corpus(output / "train").fingerprint == whole["train"]["fingerprint"]


def test_all_kinds_of_files_are_read(tmp_path, texts):
    source = tmp_path / "source"
    source.mkdir()
    lines = [json.dumps({"text": t}) + "\n" for t in texts]
    (source / "a.jsonl").write_text("".join(lines[:2]))
    with gzip.open(source / "b.jsonl.gz", "wt") as file:
        file.writelines(lines[2:4])
    (source / "c.jsonl.zst").write_bytes(zstandard.compress("".join(lines[4:6]).encode()))
    pq.write_table(pa.table({"text": texts[6:8], "n": [1, 2]}), source / "d.parquet")
    (source / "e.md").write_text(texts[8])
    (source / "f.bin").write_bytes(b"\x00\x01")
    prepare([source], tmp_path / "out", tokenizer="bytes", validation=0)
    assert decoded(Corpus(tmp_path / "out" / "train")) == texts[:9]


def test_every_frame_of_a_zstd_file_is_read_and_a_cut_one_is_counted(tmp_path, capsys):
    source = tmp_path / "s"
    source.mkdir()
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00none"
    frames = [zstandard.compress(f'{{"text": "{i}"}}\n'.encode() * 99) for i in range(3)]
    (source / "a.jsonl.zst").write_bytes(frames[0] + zstandard.compress(b"") + skipped + b"".join(frames[1:]))
    # Rows that differ, so that there is something in the file to be cut.
    whole = zstandard.compress("".join(f'{{"text": "{i * i * 7919}"}}\n' for i in range(9999)).encode())
    (source / "b.jsonl.zst").write_bytes(whole[:-20])
    code, said = command(
        capsys, source, "--tokenizer", "bytes", "--validation", "0", "--output", tmp_path / "o"
    )
    assert code == 0 and "left out (damaged): 1 (" in said and "b.jsonl.zst (damaged or cut short" in said
    held = decoded(Corpus(tmp_path / "o" / "train"))
    assert held[: 3 * 99] == ["0"] * 99 + ["1"] * 99 + ["2"] * 99
    assert len(held) > 3 * 99 + 5000  # what came before the cut
    for content in (whole[:20], whole[:-20], whole + whole[:-20]):
        (tmp_path / "c.jsonl.zst").write_bytes(content)
        options = ["--tokenizer", "bytes", "--output", tmp_path / "p"]
        code, said = command(capsys, tmp_path / "c.jsonl.zst", *options)
        assert code == 2 and "c.jsonl.zst: damaged or cut short after line " in said


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"txt": "x"}\n', "no key 'text'"),
        ("a.jsonl", b"{broken\n", "a.jsonl:1: not a JSON object"),
        ("a.parquet", b"PAR1 nothing", "not a parquet file"),
        ("a.bin.txt", b"\xff\xfe\x00", "no text in"),
    ],
)
def test_a_damaged_source_is_named_in_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        prepare([tmp_path / name], tmp_path / "out", tokenizer="bytes", validation=0)
    assert "\n" not in str(caught.value)


def test_near_duplicates_stay_on_one_side(tmp_path, texts):
    source = tmp_path / "source"
    source.mkdir()
    for i, text in enumerate(texts):
        (source / f"{i}.txt").write_text(text)
        lines = text.splitlines(keepends=True)
        edited = [line for j, line in enumerate(lines) if j % 40] + ["# changed here and there\n"]
        (source / f"copy-{i}.txt").write_text("".join(edited))
    for seed in range(6):
        output = tmp_path / f"out{seed}"
        prepare([source], output, tokenizer="bytes", validation=0.3, seed=seed)
        sides = [decoded(Corpus(output / side)) for side in ("train", "validation")]
        for text in texts:
            begin = text[:200]
            assert sum(any(begin[20:150] in other for other in side) for side in sides) == 1


def test_unrelated_texts_are_no_near_duplicates(texts):
    minhashes, kept = zip(*map(dedup.signature, texts), strict=True)
    group, _ = dedup.groups(np.stack(minhashes), kept)
    assert group.tolist() == list(range(len(texts)))


def test_the_tokenizer_is_trained_on_train_text_alone(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(20):
        (source / f"{i}.txt").write_text(f"{chr(0x4E00 + i) * 3}w{i}x " * 60)
    prepare([source], tmp_path / "out", train_tokenizer=400, validation=0.1)
    chosen = tokenizer.load(tmp_path / "out" / "train" / "tokenizer.json")
    merged = {len(chosen.encode(t)) / len(t) for t in decoded(Corpus(tmp_path / "out" / "train"))}
    unseen = {len(chosen.encode(t)) / len(t) for t in decoded(Corpus(tmp_path / "out" / "validation"))}
    assert max(merged) < min(unseen)


def test_limit_takes_whole_documents(folder, tmp_path, texts):
    result = prepare([folder], tmp_path / "out", tokenizer="bytes", validation=0, limit=200_000)
    assert 0 < result["train"]["bytes"] <= 200_000
    assert set(decoded(Corpus(tmp_path / "out" / "train"))) <= set(texts)


def test_ids_outside_the_vocabulary_are_refused_when_written(tmp_path):
    edges, sizes = np.array([0, 3]), np.array([3])
    for bad in (np.array([1, 5, 2]), np.array([1, -1, 2])):
        with pytest.raises(UserError, match="outside the vocabulary of 5"):
            write_shard(tmp_path / "s.safetensors", bad, edges, sizes, vocabulary=5, tokenizer_hash="t")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_the_dtype_is_written_and_read(tmp_path, vocabulary, dtype):
    ids = np.array([0, 1, vocabulary - 1])
    write_shard(
        tmp_path / "s", ids, np.array([0, 3]), np.array([9]), vocabulary=vocabulary, tokenizer_hash="t"
    )
    shard = open_shard(tmp_path / "s")
    assert shard.tokens.dtype == np.dtype(dtype)
    assert shard.tokens.tolist() == ids.tolist()


def test_a_missing_cut_or_foreign_shard_is_refused(corpus, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(corpus / "train", copy)
    first, second = sorted(copy.glob("shard-*"))[:2]
    data = first.read_bytes()
    first.write_bytes(data[:-100])
    with pytest.raises(UserError, match="damaged or cut short"):
        Corpus(copy)
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match="not the shard that"):
        Corpus(copy)
    first.unlink()
    with pytest.raises(UserError, match="is missing"):
        Corpus(copy)
    with pytest.raises(UserError, match="name one of its parts: train, validation"):
        Corpus(corpus)


def test_bytes_and_gpt2_files_are_tokenizers(tmp_path, trained, texts):
    plain = tokenizer.load("bytes")
    assert plain.encode("né\n") == list("né\n".encode())
    assert plain.decode(plain.encode(texts[0])) == texts[0]
    model = json.loads(trained.library.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    again = tokenizer.load(tmp_path)
    assert again.encode(texts[1]) == trained.encode(texts[1])
    assert again.end_of_text == trained.end_of_text


@pytest.mark.slow
def test_a_text_contained_in_a_longer_one_stays_with_it(tmp_path, texts):
    """2.5 times as long or 20: what is held out was not read in training."""
    source = tmp_path / "source"
    source.mkdir()
    parts = [t[:8_000] for t in texts] + [t[8_000:16_000] for t in texts]
    for i, part in enumerate(parts[:12]):
        (source / f"{i}.txt").write_text(part)
        times = 20 if i % 2 else 1.5
        around = "".join(f"line {j} of what is in no other text, {i * j}\n" for j in range(int(times * 190)))
        (source / f"longer-{i}.txt").write_text(around + part)
    for seed in range(3):
        output = tmp_path / f"out{seed}"
        prepare([source], output, tokenizer="bytes", validation=0.3, seed=seed)
        sides = [decoded(Corpus(output / side)) for side in ("train", "validation")]
        for part in parts[:12]:
            assert sorted(sum(part in text for text in side) for side in sides) == [0, 2]


def test_a_licence_in_every_file_does_not_join_them(tmp_path, texts):
    source = tmp_path / "source"
    source.mkdir()
    licence = texts[0][:3_000]
    (source / "LICENSE.txt").write_text(licence)
    for i in range(40):
        text = texts[1 + i % (len(texts) - 1)]
        (source / f"{i}.txt").write_text(
            licence + "".join(f"{i} {j} {i * j * j}, of its own\n" for j in range(500)) + text[: i * 9]
        )
    result = prepare([source], tmp_path / "out", tokenizer="bytes", validation=0.2)
    assert result["validation"]["documents"] >= 4
    assert licence in decoded(Corpus(tmp_path / "out" / "train"))


def command(capsys, *arguments):
    from entasis.cli import main

    code = main(["data", "prepare", *map(str, arguments)])
    caught = capsys.readouterr()
    return code, caught.err


def test_files_that_are_no_text_are_named_and_the_rest_is_read(tmp_path, capsys):
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    source.mkdir()
    (elsewhere / "deep" / "linked.txt").write_text("through a linked folder")
    (source / "link").symlink_to(elsewhere)
    (source / "again").symlink_to(elsewhere / "deep")
    (elsewhere / "round").symlink_to(source)
    (source / "a.txt").write_text("plain")
    (source / "same.txt").symlink_to(source / "a.txt")
    for name in ("utf-16", "utf-32"):
        (source / f"{name}.txt").write_bytes(f"décodé {name}".encode(name))
    (source / "latin.txt").write_bytes(b"x" * 110_000 + b"\xe9" + b"y" * 99)
    strange = source / os.fsdecode(b"\xff")
    strange.mkdir()
    (strange / "name.txt").write_text("a name that is not UTF-8")
    code, said = command(
        capsys, source, "--tokenizer", "bytes", "--validation", "0", "--output", tmp_path / "o"
    )
    assert code == 0
    (line,) = [line for line in said.splitlines() if line.startswith("entasis:")]
    assert "left out (not UTF-8): 1 (0.1 MB): latin.txt (not UTF-8 after about 110,000 characters)" in line
    assert sorted(decoded(Corpus(tmp_path / "o" / "train"))) == [
        "a name that is not UTF-8",
        "décodé utf-16",
        "décodé utf-32",
        "plain",
        "through a linked folder",
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', "a.jsonl:2: not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: text holds half a surrogate pair"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "a.jsonl:1: "),
        ("a.jsonl", b'{"n": ' + b"9" * 5_000 + b', "text": "x"}\n', "a.jsonl:1: not a JSON object"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9999, mtime=0)[:-20], "damaged or cut short"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdnothing", "damaged or cut short"),
    ],
)
def test_hostile_rows_are_refused_in_one_line(tmp_path, capsys, name, content, says):
    (tmp_path / name).write_bytes(content)
    code, said = command(capsys, tmp_path / name, "--tokenizer", "bytes", "--output", tmp_path / "out")
    assert code == 2
    assert said.count("entasis:") == 1 and says in said and "Traceback" not in said


def test_a_split_pattern_that_backtracks_without_end_is_named(tmp_path, trained, capsys):
    made = json.loads(trained.library.to_str())
    made["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    (tmp_path / "t.json").write_text(json.dumps(made))
    (tmp_path / "a.txt").write_text("a" * 60 + "!")
    code, said = command(
        capsys,
        tmp_path / "a.txt",
        "--tokenizer",
        tmp_path / "t.json",
        "--output",
        tmp_path / "o",
        "--validation",
        "0",
    )
    assert code == 2
    assert "look at its split pattern" in said


@pytest.mark.slow
def test_one_huge_document_takes_bounded_memory_and_loses_nothing(tmp_path):
    """A text of 8 MB without one line end becomes documents of at most 2 million characters."""
    text = "".join(f"word{i % 977} " for i in range(1_000_000))
    (tmp_path / "a.txt").write_text(text)
    child = (
        "import resource, sys; from entasis.cli import main; code = main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10); sys.exit(code)"
    )
    options = ["--tokenizer", "bytes", "--validation", "0"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            child,
            "data",
            "prepare",
            tmp_path / "a.txt",
            "--output",
            tmp_path / "out",
            *options,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1500
    train = Corpus(tmp_path / "out" / "train")
    assert "".join(decoded(train)) == text
    assert train.documents == -(-len(text) // (1 << 21))


def test_a_full_disk_is_one_line_and_freeing_it_goes_on(folder, tmp_path):
    command = [sys.executable, "-m", "entasis", "data", "prepare", str(folder), "--train-tokenizer", "600"]
    command += ["--output", str(tmp_path / "out")]
    limited = ["bash", "-c", 'ulimit -f 300; exec "$0" "$@"', *command]
    done = subprocess.run(limited, capture_output=True, text=True)
    lines = [x for x in done.stderr.splitlines() if x.startswith("entasis:")]
    assert (done.returncode, len(lines)) == (1, 1) and "Traceback" not in done.stderr
    assert str(tmp_path / "out") in lines[0] and "needed" in lines[0] and "raise the limit" in lines[0]
    assert subprocess.run(command, capture_output=True).returncode == 0


RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастлива по-своему. "


def kinds_of_tokenizers() -> dict[str, Library]:
    """Two that lose Cyrillic text, and some that give every text back, or another form of it."""
    limited = Library(models.BPE())
    limited.pre_tokenizer, limited.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words = ["The", "text", ".", "-", ",", *re.findall(r"\w+", RUSSIAN.replace("каждая", ""))]
    known = {word: i for i, word in enumerate(dict.fromkeys(["[UNK]", *words]))}
    unknown = Library(models.WordLevel(known, unk_token="[UNK]"))
    unknown.pre_tokenizer, unknown.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    metaspace = Library(models.BPE(unk_token="<unk>"))
    metaspace.pre_tokenizer, metaspace.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    normalising = Library(models.BPE())
    normalising.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    normalising.pre_tokenizer, normalising.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        decoders.ByteLevel(),
    )
    options = {"vocab_size": 400, "show_progress": False}
    limited.train_from_iterator(["The text. "], trainers.BpeTrainer(**options))
    metaspace.train_from_iterator(
        ["The text. e\u0301", RUSSIAN], trainers.BpeTrainer(special_tokens=["<unk>"], **options)
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    normalising.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, **options))
    made = {"limited": limited, "unknown": unknown, "metaspace": metaspace, "normalising": normalising}
    return {**made, "bytes": tokenizer.load("bytes").library}


@pytest.mark.parametrize("kind", ["limited", "unknown", "metaspace", "normalising", "bytes"])
def test_text_that_a_tokenizer_loses_is_measured_and_said(tmp_path, capsys, kind):
    from entasis.cli import main

    source = tmp_path / "s"
    source.mkdir()
    for i in range(6):
        words = " ".join(random.Random(i).choices(RUSSIAN.split(), k=20))
        (source / f"{i}.txt").write_text(f"The text. e\u0301 {words}", encoding="utf-8")
    (tmp_path / "t.json").write_text(kinds_of_tokenizers()[kind].to_str())
    options = ["--tokenizer", tmp_path / "t.json", "--output", tmp_path / "o", "--validation", "30%"]
    code, said = command(capsys, source, *options)
    assert code == 0
    line = re.search(
        r"the tokenizer loses ([\d.]+) % of the text: its bits per byte cannot be compared", said
    )
    assert main(["data", "doctor", str(tmp_path / "o")]) == 0
    noted = capsys.readouterr().out
    shares = {}
    for side in ("train", "validation"):
        shares[side] = json.loads((tmp_path / "o" / side / "corpus.json").read_text())["text_lost"]
        told = f"note: {side}: the tokenizer loses {100 * shares[side]:.3g} % of the text"
        assert (told in noted) == (kind in ("limited", "unknown"))
    if kind in ("limited", "unknown"):
        assert float(line[1]) == pytest.approx(100 * max(shares.values()), rel=0.01)
        text = "".join(path.read_text(encoding="utf-8") for path in source.iterdir())
        gone = r"[а-яА-Я]" if kind == "limited" else r"каждая"
        expected = len("".join(re.findall(gone, text)).encode()) / len(text.encode())
        total = sum(Corpus(tmp_path / "o" / s).bytes * share for s, share in shares.items())
        assert total / len(text.encode()) == pytest.approx(expected, abs=0.03)
    else:
        assert line is None and max(shares.values()) == 0
