"""A small `benchmarks/doctor_matrix.py`: kinds of text and of tokenizers, made here."""

import random
import sys
from pathlib import Path

import pytest

from entasis.cli import main

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import doctor_matrix
import doctor_samples

from entasis.data import tokenizer as tokenizers


def words(letters, draw, between=" "):
    """Text of made-up words, few of them frequent."""
    known = ["".join(draw.choices(letters, k=draw.randint(1, 5))) for _ in range(3000)]
    frequency = [1 / (i + 1) for i in range(len(known))]
    return [between.join(draw.choices(known, frequency, k=400)) + "。\n" for _ in range(20)]


@pytest.fixture(scope="module")
def kinds(texts):
    draw = random.Random(0)
    made = doctor_samples._generated(random.Random(0))
    made = {name: made[name] for name in ("emoji", "DNA in one line", "A,C,G,T", "prices.csv", "sparse.csv")}
    made["Chinese"] = words([chr(c) for c in range(0x4E00, 0x5200)], draw, "")
    made["Arabic"] = words([chr(c) for c in range(0x0621, 0x064A)], draw)
    made["Python"] = texts
    return {name: list(doctor_samples.up_to(parts, 20_000)) for name, parts in made.items()}


@pytest.fixture(scope="module")
def every(kinds):
    mixed, latin = [p for parts in kinds.values() for p in parts], kinds["Python"]
    made = {
        "bytes": tokenizers.load("bytes").library,
        "byte-level": tokenizers.train(mixed, 3000).library,
        "unigram": doctor_samples._unigram(mixed, 3000, fallback=False),
        "unigram, byte fallback": doctor_samples._unigram(latin, 600, fallback=True),
        "Llama-2's kind": doctor_samples._llama2(latin, 900),
        "WordPiece": doctor_samples._wordpiece(mixed, 3000, lowercase=True),
        "characters": doctor_samples._characters(mixed, end=False),
        "characters, no decoder": doctor_samples._characters(mixed, end=True, decoder=False),
    }
    return {name: tokenizers.Tokenizer(library) for name, library in made.items()}


@pytest.mark.slow
def test_sound_text_of_every_kind_is_left_in_peace_and_every_fault_named(kinds, every, tmp_path):
    wrong, examined, planted = [], 0, 0
    for i, (script, parts) in enumerate(kinds.items()):
        streams = {name: doctor_matrix.stream(chosen, parts) for name, chosen in every.items()}
        for j, (name, chosen) in enumerate(every.items()):
            ids = streams[name]
            if chosen.unknown is not None and (ids == chosen.unknown).mean() > 0.5:
                continue
            for case in doctor_matrix.sound(ids, chosen):
                examined += 1
                if found := doctor_matrix.examined(tmp_path / "x", case):
                    wrong.append((script, name, case[0], len(case[1]), found))
            if i == j:
                for case in (
                    *doctor_matrix.faults(ids, chosen),
                    *doctor_matrix.foreign(name, ids, every, streams),
                ):
                    planted += 1
                    if case[0] not in (
                        doctor_matrix.CIPHER,
                        doctor_matrix.FOLDED,
                    ) and not doctor_matrix.examined(tmp_path / "x", case):
                        wrong.append((script, name, case[0], [n for n, t in every.items() if t is case[4]]))
    assert not wrong
    assert examined > 400 and planted > 200


def test_a_sentencepiece_corpus_made_by_prepare_passes_the_command(tmp_path, kinds, every, capsys):
    """In Chinese a Llama-2-like tokenizer of Latin text writes bytes, and stretches of ids begin inside characters."""
    every["Llama-2's kind"].save(tmp_path / "tokenizer.json")
    (tmp_path / "text").mkdir()
    for i, part in enumerate(kinds["Chinese"]):
        (tmp_path / "text" / f"{i}.txt").write_text(part)
    tokenizer, out = str(tmp_path / "tokenizer.json"), str(tmp_path / "out")
    made = main(
        ["data", "prepare", str(tmp_path / "text"), "--tokenizer", tokenizer, "--output", out, "--seed", "1"]
    )
    assert made == 0
    # The folder stands for all its parts.
    assert main(["data", "doctor", out]) == 0
    assert "sound" in capsys.readouterr().out
    shard = tmp_path / "out/validation/shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["data", "doctor", out]) == 1
    assert "validation: " in capsys.readouterr().out
