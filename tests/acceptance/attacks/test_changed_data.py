"""Data that changes under a run: hashed at the start and when it goes on, documents' lengths, bytes and hashes included."""

import shutil

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from entasis.data import shards
from entasis.data.doctor import examine

from .damage import DAMAGES


@pytest.fixture
def moved(ground, tmp_path):
    """(recipe, corpus): a copy of the corpus, whose files may be spoilt, and a recipe on it."""
    shutil.copytree(ground / "corpus", tmp_path / "corpus")
    text = (ground / "recipe.yaml").read_text().replace(str(ground / "corpus"), str(tmp_path / "corpus"))
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml", tmp_path / "corpus"


def rewrite(shard, change):
    """Changes a shard's tensors and leaves its metadata as it is."""
    with safe_open(shard, framework="np") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata=metadata)


def swap_ids(tensors):
    tensors["tokens"][2000:3000] = tensors["tokens"][4000:5000].copy()


def swap_document_bytes(tensors):
    sizes = tensors["document_bytes"]
    sizes[0], sizes[1] = sizes[1].copy(), sizes[0].copy()


def move_a_boundary(tensors):
    tensors["documents"][1] += 1


def change_document_hashes(tensors):
    """Other documents are drawn then to choose settings by, and to test on."""
    tensors["document_hashes"] = ~tensors["document_hashes"]


def drop_document_hashes(tensors):
    del tensors["document_hashes"]


CHANGES = [
    swap_ids, swap_document_bytes, move_a_boundary, change_document_hashes, drop_document_hashes,
]  # fmt: skip


@pytest.mark.parametrize("side", ["train", "validation"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_neither_begun_nor_gone_on_with(call, moved, tmp_path, side, change):
    recipe, corpus = moved
    assert call("train", recipe, "--output", tmp_path / "run").code == 0
    (tmp_path / "run" / "result.json").unlink()
    rewrite(next((corpus / side).glob("*.safetensors")), change)
    for folder in ("run", "new"):
        call("train", recipe, "--output", tmp_path / folder).refused("damaged: ", str(corpus / side))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", CHANGES)
def test_the_doctor_names_the_changed_shard(moved, change):
    shard = next((moved[1] / "validation").glob("*.safetensors"))
    assert examine(shard.parent, thorough=True).sound
    rewrite(shard, change)
    (found,) = examine(shard.parent, thorough=True).findings
    assert found.name == "corrupted content" and shard.name in found.evidence


def test_a_shard_of_earlier_versions_has_no_hash_of_its_documents_hashes(moved):
    folder = moved[1] / "validation"
    shard = next(folder.glob("*.safetensors"))
    with safe_open(shard, framework="np") as file:
        metadata = file.metadata()
    assert metadata.pop("hashes")
    save_file(load_file(shard), shard, metadata=metadata)
    opened = shards.open_shard(shard)
    shards.verify(opened)
    assert opened.document_hashes is not None and np.unique(opened.document_hashes).size > 1
    assert examine(folder, thorough=True).sound


def test_a_model_is_not_scored_on_changed_text(call, ground, moved):
    corpus = moved[1] / "validation"
    rewrite(next(corpus.glob("*.safetensors")), swap_document_bytes)
    call("evaluate", ground / "run", "--text", corpus).refused("damaged: ", str(corpus))


def test_a_large_shard_is_read_once_and_again_when_it_was_touched(call, moved, tmp_path, monkeypatch):
    recipe, corpus = moved
    monkeypatch.setattr(shards, "_LARGE", 1)
    monkeypatch.setattr(shards, "_JUST_NOW", 0)
    assert call("train", recipe, "--output", tmp_path / "run").code == 0
    shard = next((corpus / "train").glob("*.safetensors"))
    opened = shards.open_shard(shard)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "content_hash", lambda *arrays: pytest.fail("read again"))
        shards.verify(opened)
    rewrite(shard, swap_ids)
    call("train", recipe, "--output", tmp_path / "new").refused("damaged: ", str(shard))


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["corpus.json", "tokenizer.json", "shard-00000.safetensors"])
def test_a_damaged_corpus_is_refused_in_one_line(call, moved, tmp_path, name, kind):
    recipe, corpus = moved
    DAMAGES[kind](corpus / "train" / name)
    answer = call("train", recipe, "--output", tmp_path / "run")
    answer.refused(str(corpus / "train"))
    assert not (tmp_path / "run").exists()
