"""Each fault planted in real tokens is named; sound data is left in peace."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest

from entasis.data import doctor, importers
from entasis.data.corpus import Corpus
from entasis.data.importers import import_tokens
from entasis.errors import UserError


@pytest.fixture(scope="session")
def ids(large, texts):
    """Real ids of the large tokenizer, documents closed."""
    parts = [np.append(x, large.end_of_text) for x in large.encode_batch(texts)]
    return np.concatenate(parts).astype(np.int64)


def names(diagnosis):
    return [f.name for f in diagnosis.findings]


def written(path, array):
    np.ascontiguousarray(array).tofile(path)
    return path


@pytest.mark.parametrize("length", [16, 200, 5000, None])
@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ("<i4", "uint16"),
        ("<u4", "uint16"),
        ("<i8", "uint16"),
        ("<i8", "uint32"),
        (">u4", "uint16"),
        ("<i4", "int16"),
    ],
)
def test_wide_ids_read_as_narrow_ones_are_recognised(tmp_path, ids, stored, read, length):
    path = written(tmp_path / "x.bin", ids[:length].astype(stored))
    diagnosis = doctor.examine(path, read)
    assert "wider ids read as narrower" in names(diagnosis)
    fix = diagnosis.findings[0].fix
    assert ("64" if "8" in stored else "32") in fix
    assert fix.endswith("be") == stored.startswith(">")


def test_wide_ids_are_recognised_above_65536_too(tmp_path, ids):
    rng = np.random.default_rng(0)
    high = np.where(rng.random(len(ids)) < 0.3, ids + 65_536, ids)
    path = written(tmp_path / "x.bin", high.astype("<u4"))
    assert names(doctor.examine(path, "uint16", 100_000))[0] == "wider ids read as narrower"
    assert doctor.examine(path, "uint32", 100_000).sound


def test_narrow_ids_read_as_wide_ones_are_recognised(tmp_path, ids):
    path = written(tmp_path / "x.bin", ids[: len(ids) // 2 * 2].astype("<u2"))
    assert "narrower ids read as wider" in names(doctor.examine(path, "uint32"))


@pytest.mark.parametrize("vocabulary", [6000, None])
def test_swapped_bytes_are_recognised(tmp_path, ids, vocabulary):
    path = written(tmp_path / "x.bin", ids.astype(">u2"))
    diagnosis = doctor.examine(path, "uint16", vocabulary)
    assert "swapped bytes" in names(diagnosis)
    assert doctor.examine(path, "uint16be", vocabulary).sound
    wide = written(tmp_path / "y.bin", ids.astype(">u4"))
    assert "swapped bytes" in names(doctor.examine(wide, "uint32"))


def test_a_swallowed_header_is_recognised(tmp_path, ids):
    np.save(tmp_path / "x.npy", ids.astype(np.uint16))
    assert names(doctor.examine(tmp_path / "x.npy", "uint16"))[0] == "swallowed .npy header"
    assert doctor.examine(tmp_path / "x.npy").sound
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    (tmp_path / "x.bin").write_bytes(header.tobytes() + ids.astype("<u2").tobytes())
    assert "swallowed header" in names(doctor.examine(tmp_path / "x.bin", "uint16"))


def test_wrapped_ids_are_recognised(tmp_path, ids):
    assert "wrapped ids" in names(
        doctor.examine(written(tmp_path / "a", ids.astype("<u2")), "uint16", 100_277)
    )
    wrapped = ((ids * 13) % 65_536).astype("<i2")
    assert "wrapped ids" in names(doctor.examine(written(tmp_path / "b", wrapped), "int16", 60_000))
    through_16_bits = (ids * 17 % 100_277 & 0xFFFF).astype("<u4")
    assert "wrapped ids" in names(doctor.examine(written(tmp_path / "c", through_16_bits), "uint32", 100_277))


def test_ids_outside_the_vocabulary_are_recognised(tmp_path, ids):
    path = written(tmp_path / "x.bin", ids.astype("<u2"))
    assert names(doctor.examine(path, "uint16", 3000)) == ["ids outside the vocabulary"]


def test_the_wrong_tokenizer_is_recognised(tmp_path, ids, texts, large, trained):
    from entasis.data import tokenizer

    other = tokenizer.train(reversed(texts[3:]), 6000)
    assert other.hash != large.hash
    other.save(tmp_path / "other.json")
    large.save(tmp_path / "large.json")
    path = written(tmp_path / "x.bin", ids.astype("<u2"))
    assert names(doctor.examine(path, "uint16", tokenizer=tmp_path / "other.json")) == ["wrong tokenizer"]
    assert doctor.examine(path, "uint16", tokenizer=tmp_path / "large.json").sound


def test_a_cut_file_is_recognised(tmp_path, ids):
    path = tmp_path / "x.bin"
    path.write_bytes(ids.astype("<u2").tobytes()[:-1])
    assert "truncated file" in names(doctor.examine(path, "uint16"))
    np.save(tmp_path / "y.npy", ids)
    (tmp_path / "y.npy").write_bytes((tmp_path / "y.npy").read_bytes()[:-8])
    assert "truncated file" in names(doctor.examine(tmp_path / "y.npy"))


@pytest.mark.parametrize("vocabulary", [257, 300, 1000, 6000])
@pytest.mark.parametrize("length", [1, 20, 500, None])
def test_sound_data_is_left_in_peace(tmp_path, texts, vocabulary, length):
    from entasis.data import tokenizer

    chosen = tokenizer.load("bytes") if vocabulary == 257 else tokenizer.train(texts, vocabulary)
    parts = [np.append(x, chosen.end_of_text) for x in chosen.encode_batch(texts)]
    ids = np.concatenate(parts)[:length]
    chosen.save(tmp_path / "t.json")
    for dtype in ("uint16", "int32", "uint32", "int64"):
        path = written(tmp_path / dtype, ids.astype(dtype))
        diagnosis = doctor.examine(path, dtype, vocabulary, tmp_path / "t.json")
        assert diagnosis.sound, diagnosis
        assert doctor.examine(path, dtype).sound


def test_a_corpus_is_examined_against_its_own_words(corpus, tmp_path, trained):
    import shutil

    assert doctor.examine(corpus / "train", thorough=True).sound
    copy = tmp_path / "copy"
    shutil.copytree(corpus / "train", copy)
    shard = sorted(copy.glob("shard-*"))[0]
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    assert "corrupted content" in names(doctor.examine(copy, thorough=True))
    trained.save(copy / "tokenizer.json")
    assert "wrong tokenizer" in names(doctor.examine(copy))
    shard.unlink()
    assert names(doctor.examine(copy)) == ["damaged corpus"]


def test_a_header_of_a_npy_file_that_was_cut_or_changed_is_a_finding(tmp_path, ids, capsys):
    from entasis.cli import main

    np.save(tmp_path / "x.npy", ids)
    whole = (tmp_path / "x.npy").read_bytes()
    damages = [whole[:n] for n in (6, 7, 9, 20, 100)]
    damages += [
        whole[:10] + text + whole[10 + len(text) :] for text in (b"{'descr':'<i8", b"(" * 90, b"x y ")
    ]
    for damaged in damages:
        (tmp_path / "y.npy").write_bytes(damaged)
        assert main(["data", "doctor", str(tmp_path / "y.npy")]) == 1
        assert "y.npy: truncated file\n" in capsys.readouterr().out


def test_what_is_told_of_a_corpus_is_checked_or_refused(corpus, capsys):
    from entasis.cli import main

    for folder in (corpus, corpus / "train"):
        assert main(["data", "doctor", str(folder), "--vocabulary", "1000"]) == 0
        capsys.readouterr()
        assert main(["data", "doctor", str(folder), "--vocabulary", "100"]) == 1
        assert "the vocabulary told is 100" in capsys.readouterr().out
        assert main(["data", "doctor", str(folder), "--dtype", "int64"]) == 2
        assert "a corpus says its own type; leave --dtype out" in capsys.readouterr().err


def test_a_raw_file_needs_its_type_told(tmp_path, ids):
    path = written(tmp_path / "x.bin", ids.astype("<u2"))
    with pytest.raises(UserError, match="never guessed"):
        doctor.examine(path)


def formats(folder, ids):
    """One sound file of each format: (format, dtype to tell, path)."""
    small = ids.astype("<u2")
    yield "raw", "uint16", written(folder / "raw.bin", small)
    yield "nanogpt", "uint16", written(folder / "train.bin", small)
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    (folder / "llm.bin").write_bytes(header.tobytes() + small.tobytes())
    yield "llm.c", None, folder / "llm.bin"
    header[:3] = 20240801, 7, len(ids)
    (folder / "llm3.bin").write_bytes(header.tobytes() + ids.astype("<u4").tobytes())
    yield "llm.c", None, folder / "llm3.bin"
    np.save(folder / "x.npy", ids.astype(np.int32))
    yield "npy", None, folder / "x.npy"
    written(folder / "mega.bin", small)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 1, 2) + struct.pack("<iqqq", len(ids), 0, 0, 1)
    (folder / "mega.idx").write_bytes(index)
    yield "megatron", None, folder / "mega.bin"


def test_every_format_comes_in_with_its_documents_and_bytes(tmp_path, ids, texts, large):
    large.save(tmp_path / "t.json")
    seen = set()
    for number, (format, dtype, path) in enumerate(formats(tmp_path, ids)):
        output = tmp_path / f"out{number}"
        import_tokens(
            path, output, format=format, dtype=dtype, tokenizer=tmp_path / "t.json", shard_tokens=30_000
        )
        corpus = Corpus(output)
        assert np.array_equal(corpus.read(0, corpus.tokens), ids)
        assert corpus.document_bytes().tolist() == [len(t.encode()) for t in texts]
        assert len(corpus.shards) > 1
        seen.add(format)
    assert seen == set(importers.IMPORTERS)


def test_documents_of_a_megatron_file_without_end_of_text_are_those_of_its_index(
    tmp_path, texts, large, capsys
):
    from entasis.cli import main

    large.save(tmp_path / "t.json")
    parts = large.encode_batch(texts)
    written(tmp_path / "mega.bin", np.concatenate(parts).astype("<u2"))
    # The first document has two sequences.
    lengths = [100, len(parts[0]) - 100, *map(len, parts[1:])]
    begins = [0, *range(2, len(lengths) + 1)]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(lengths), len(begins))
    index += np.array(lengths, "<i4").tobytes() + bytes(8 * len(lengths)) + np.array(begins, "<i8").tobytes()
    (tmp_path / "mega.idx").write_bytes(index)
    options = [
        "--format",
        "megatron",
        "--tokenizer",
        str(tmp_path / "t.json"),
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(["data", "import", str(tmp_path / "mega.bin"), *options]) == 0
    assert "has no end-of-text token of this tokenizer; documents end where the file says" in (
        capsys.readouterr().err
    )
    corpus = Corpus(tmp_path / "o")
    assert np.diff(corpus.document_offsets()).tolist() == [len(p) for p in parts]
    assert corpus.document_bytes().tolist() == [len(t.encode()) for t in texts]
    told = {"format": "megatron", "dtype": None, "tokenizer": tmp_path / "t.json"}
    import_tokens(tmp_path / "mega.bin", tmp_path / "small", shard_tokens=30_000, **told)
    small = Corpus(tmp_path / "small")
    assert len(small.shards) > 1
    assert small.document_offsets().tolist() == corpus.document_offsets().tolist()
    (tmp_path / "mega.idx").write_bytes(index[:-8])
    with pytest.raises(UserError, match="cut short"):
        import_tokens(tmp_path / "mega.bin", tmp_path / "p", **told)


@pytest.mark.parametrize("stored", ["<i4", "<u4", "<i8"])
def test_wide_tokens_cannot_come_in_as_uint16_through_any_door(tmp_path, ids, large, stored):
    """2509.06518's fault: tokens written as int32, read as uint16, every other one zero."""
    large.save(tmp_path / "t.json")
    wide = ids.astype(stored)
    path = written(tmp_path / "wide.bin", wide)
    np.save(tmp_path / "wide.npy", wide)
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, wide.nbytes // 2
    (tmp_path / "wide-llm.bin").write_bytes(header.tobytes() + wide.tobytes())
    written(tmp_path / "mega.bin", wide)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 1, 2)
    (tmp_path / "mega.idx").write_bytes(index + struct.pack("<iqqq", wide.nbytes // 2, 0, 0, 1))
    doors = [
        ("raw", "uint16", path),
        ("nanogpt", "uint16", path),
        ("npy", "uint16", tmp_path / "wide.npy"),
        ("llm.c", None, tmp_path / "wide-llm.bin"),
        ("megatron", None, tmp_path / "mega.bin"),
    ]
    assert {d[0] for d in doors} == set(importers.IMPORTERS)
    for format, dtype, file in doors:
        with pytest.raises(UserError):
            import_tokens(file, tmp_path / "out", format=format, dtype=dtype, tokenizer=tmp_path / "t.json")
        assert not (tmp_path / "out").exists()
    for format in ("raw", "nanogpt"):  # and no type is guessed where none is told
        with pytest.raises(UserError, match="never guessed"):
            import_tokens(path, tmp_path / "out", format=format, dtype=None, tokenizer=tmp_path / "t.json")


def entasis(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "entasis", *map(str, arguments)], capture_output=True, text=True
    )


def test_the_command_says_so_with_its_exit_code(tmp_path, ids, corpus):
    sick = written(tmp_path / "sick.bin", ids.astype("<i4"))
    done = entasis("data", "doctor", sick, "--dtype", "uint16")
    assert done.returncode == 1
    assert "wider ids read as narrower" in done.stdout
    assert "--dtype uint32" in done.stdout
    well = entasis("data", "doctor", corpus / "train", "--json")
    assert well.returncode == 0
    assert json.loads(well.stdout)["sound"]
    for wrong in (
        ["doctor", tmp_path / "none"],
        ["doctor", sick],
        ["inspect", tmp_path],
        ["doctor", sick, "--dtype", "x"],
    ):
        done = entasis("data", *wrong)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
