"""The published bug, reproduced on purpose, is seen by the doctor and kept out of training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from entasis.cli import main
from entasis.data import tokenizer
from entasis.data.corpus import Corpus
from entasis.data.corruption import corrupt
from entasis.data.doctor import Diagnosis, examine
from entasis.data.examinations import Finding
from entasis.data.prepare import prepare
from entasis.errors import UserError
from entasis.train import preflight, recipe


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("c")
    prepare(["stdlib"], folder, train_tokenizer=512, limit=300_000, shard_tokens=1 << 14)
    return folder


def test_every_second_id_is_zero_and_documents_keep_their_bytes(sound: Path, tmp_path: Path) -> None:
    command = ["data", "import", str(sound / "train"), "--output", str(tmp_path / "bad")]
    assert main([*command, "--format", "corrupt:int32-read-as-uint16"]) == 0
    good, bad = Corpus(sound / "train"), Corpus(tmp_path / "bad")
    ids, words = good.read(0, good.tokens), bad.read(0, bad.tokens)
    assert len(good.shards) > 1 and bad.corruption == "int32-read-as-uint16" and good.corruption is None
    np.testing.assert_array_equal(words[::2], ids)
    assert not words[1::2].any() and len(words) == 2 * len(ids)
    np.testing.assert_array_equal(bad.document_offsets(), 2 * good.document_offsets())
    np.testing.assert_array_equal(bad.document_bytes(), good.document_bytes())


def test_training_refuses_it_unless_told(sound: Path, tmp_path: Path) -> None:
    corrupt(sound / "train", tmp_path / "bad", "int32-read-as-uint16")
    assert not examine(tmp_path / "bad").sound
    wanted = recipe.from_dict(
        {
            "shape": {"profile": "isotropic", "layers": 2, "d_model": 32, "head_dim": 8},
            "data": {"train": str(tmp_path / "bad"), "sequence": 32},
            "tokens": 1024,
        }
    )
    with pytest.raises(UserError, match=r"corrupted on purpose .*data\.allow_corruption=true"):
        preflight.check_data(wanted)
    wanted.data.allow_corruption = True
    assert preflight.check_data(wanted).tokens == 2 * Corpus(sound / "train").tokens
    with pytest.raises(
        UserError, match=r"unknown key data\.dangerous; it is called data\.allow_corruption now"
    ):
        recipe.from_dict({"shape": {}, "data": {"train": "x", "dangerous": True}, "tokens": 1024})
    wanted.data.allow_corruption = False
    # The mark of earlier versions is one too; without any the corpus is what it looks like.
    index = json.loads((tmp_path / "bad" / "corpus.json").read_text())
    del index["hash"]
    index["danger"] = index.pop("corruption")
    (tmp_path / "bad" / "corpus.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="corrupted on purpose"):
        preflight.check_data(wanted)
    del index["danger"]
    (tmp_path / "bad" / "corpus.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is corrupt"):
        preflight.check_data(wanted)


def test_what_the_doctor_finds_is_a_note_where_it_is_told_so(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = Finding("swapped bytes", "the low byte is the more predictable one", "import it anew")
    monkeypatch.setattr(preflight, "examine", lambda path: Diagnosis(str(path), 1, (finding,)))
    shutil.copytree(sound / "train", tmp_path / "accused")
    wanted = recipe.from_dict(
        {
            "shape": {"profile": "isotropic", "layers": 2, "d_model": 32, "head_dim": 8},
            "data": {"train": str(tmp_path / "accused"), "sequence": 32},
            "tokens": 1024,
        }
    )
    with pytest.raises(UserError, match="is corrupt: swapped bytes"):
        preflight.check_data(wanted)
    wanted.data.allow_corruption = True
    assert preflight.check_data(wanted).corruption is None
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: ") and str(tmp_path / "accused") in note
    assert f"{finding.name}: {finding.evidence}" in note
    # Another tokenizer than the corpus's own is certain, and refused all the same.
    tokenizer.from_bytes().save(tmp_path / "accused" / "tokenizer.json")
    with pytest.raises(UserError, match="is corrupt"):
        preflight.check_data(wanted)


def test_unknown_corruptions_and_full_folders(sound: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose one of int32-read-as-uint16"):
        corrupt(sound / "train", tmp_path / "bad", "rot13")
    with pytest.raises(UserError, match="not empty"):
        corrupt(sound / "train", sound, "int32-read-as-uint16")
