"""Damaged, inconsistent and hostile sources are refused in one line, and nothing is left behind."""

import json
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel

from entasis.cli import main
from entasis.data import tokenizer
from entasis.errors import UserError
from entasis.interop.importing import import_model


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    tiny.hugging_face("llama").save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture
def whole(tmp_path):
    folder = tmp_path / "whole"
    tiny.hugging_face("llama").save_pretrained(folder)
    return folder


def refused(source: Path, *words: str, **options: object) -> None:
    out = source.parent / "out"
    before = sorted(p.name for p in source.parent.iterdir())
    with pytest.raises(UserError) as error:
        import_model(source, out, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    assert all(word in message for word in words), message
    assert sorted(p.name for p in source.parent.iterdir()) == before


def rewrite(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_truncated_shard(source):
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(source, shard.name, "not a whole safetensors file")


def test_missing_shard(source):
    shard = sorted(source.glob("*.safetensors"))[0]
    shard.unlink()
    refused(source, shard.name, "missing")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..", "sub/model.safetensors", "a\\b", "", "a\0b"]
)
def test_hostile_file_names_in_the_index(source, name):
    def change(index):
        index["weight_map"] = dict.fromkeys(index["weight_map"], name)

    rewrite(source / "model.safetensors.index.json", change)
    refused(source, repr(name), "plain name")


def test_links_out_of_the_folder_are_not_followed(whole, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (whole / "tokenizer.json").symlink_to(secret)
    refused(whole, "tokenizer.json", "link out of the folder")


def test_the_links_of_the_hugging_face_cache_are_followed(whole, tmp_path):
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    blobs = tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in list(whole.iterdir()):
        file.rename(blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
    assert import_model(snapshot, tmp_path / "out").family == "llama"


def test_a_pipe_instead_of_a_file_does_not_hang(whole):
    (whole / "config.json").unlink()
    os.mkfifo(whole / "config.json")
    refused(whole, "config.json", "not a regular file")


def test_only_pickled_weights(whole):
    (whole / "model.safetensors").rename(whole / "pytorch_model.bin")
    refused(whole, "pickled")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 4}, ["model.layers.3", "missing"]),
        ({"num_hidden_layers": 2}, ["model.layers.2", "no place"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "number of tensors"]),
        ({"num_hidden_layers": 10**50}, ["num_hidden_layers", "30 digits"]),
        ({"intermediate_size": 64}, ["96 × 64", "64 × 64"]),
        ({"hidden_size": "big"}, ["hidden_size is 'big'"]),
        ({"hidden_size": None}, ["hidden_size is missing"]),
        ({"num_key_value_heads": 3}, ["n_kv_heads is 3"]),
        ({"vocab_size": 100}, ["embed_tokens", "160 × 64", "100 × 64"]),
        ({"tie_word_embeddings": True}, ["lm_head.weight", "differ"]),
        ({"attention_bias": True}, ["q_proj.bias", "missing"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "finite"]),
        ({"max_position_embeddings": 2**40}, ["max_position_embeddings"]),
    ],
)
def test_config_and_tensors_disagree(whole, changes, words):
    rewrite(whole / "config.json", lambda config: config.update(changes))
    refused(whole, *words)


def test_a_tensor_that_belongs_nowhere(whole):
    weights = load_file(whole / "model.safetensors")
    weights["model.layers.0.self_attn.secret"] = torch.zeros(3)
    save_file(weights, whole / "model.safetensors")
    refused(whole, "self_attn.secret", "no place")


def test_weights_of_another_type(whole):
    weights = load_file(whole / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].to(torch.int8)}, whole / "model.safetensors")
    refused(whole, name, "I8")


def test_a_tensor_in_two_shards_and_an_index_that_lies(source):
    first, second = sorted(source.glob("*.safetensors"))[:2]
    ours = load_file(second)
    stolen = next(iter(load_file(first).items()))
    save_file({**ours, stolen[0]: stolen[1]}, second)
    refused(source, stolen[0], "another shard")
    save_file(dict(list(ours.items())[1:]), second)
    refused(source, "index but in no shard")


def raw_safetensors(path: Path, header: bytes, data: bytes = bytes(64)) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b'{"a":{"dtype":"F32","shape":[10],"data_offsets":[0,40]},'
         b'"b":{"dtype":"F32","shape":[8],"data_offsets":[32,64]}}', "not a whole"),
        (b'{"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]},'
         b'"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}}', "twice"),
        (b'{"a\\n":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}}', "printable"),
        (b'{"a":{"dtype":"F8_E4M3","shape":[64],"data_offsets":[0,64]}}', "F8_E4M3"),
        (b"[" * 10_000, "not a whole"),
    ],
)  # fmt: skip
def test_damaged_safetensors_headers(whole, header, words):
    raw_safetensors(whole / "model.safetensors", header)
    refused(whole, words)


def test_a_safetensors_header_longer_than_the_file(whole):
    (whole / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + bytes(100))
    refused(whole, str(2**60))


def test_the_tokenizer_of_a_larger_vocabulary(whole):
    Tokenizer(WordLevel({f"w{i}": i for i in range(161)}, unk_token="w0")).save(str(whole / "tokenizer.json"))
    refused(whole, "number 160", "160 rows")


def test_a_tokenizer_that_is_none(whole, tmp_path):
    (whole / "tokenizer.json").write_text('{"model": 3}')
    refused(whole, "tokenizer.json", "cannot be read")
    (whole / "tokenizer.json").unlink()
    Tokenizer(BPE({"a": 0, "b": 1}, [])).save(str(tmp_path / "mine.json"))
    result = import_model(whole, tmp_path / "out", tokenizer=tmp_path / "mine.json")
    assert result.tokenizer and (tmp_path / "out" / "tokenizer.json").exists()


def test_gpt2_of_old_has_its_tokenizer_made_of_vocabulary_and_merges(tmp_path):
    folder = tmp_path / "source"
    tiny.hugging_face("gpt2").save_pretrained(folder)
    words = ["a", "b", "ab", "\u0120", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    assert import_model(folder, tmp_path / "out").tokenizer
    read = tokenizer.load(tmp_path / "out")
    assert (read.encode("ab a"), read.end_of_text) == ([2, 3, 0], 4)


def test_the_chat_template_comes_along_and_code_does_not(whole, tmp_path):
    Tokenizer(BPE({"a": 0, "b": 1}, [])).save(str(whole / "tokenizer.json"))
    (whole / "tokenizer_config.json").write_text('{"bos_token": "a", "auto_map": {"AutoTokenizer": "x.Y"}}')
    (whole / "chat_template.jinja").write_text("{{ messages }}")
    assert import_model(whole, tmp_path / "out").chat_template
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config == {"bos_token": "a", "chat_template": "{{ messages }}"}
    told = json.loads((tmp_path / "out" / "provenance.json").read_text())["source"]
    assert {entry["file"] for entry in told} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
    }  # fmt: skip


def test_a_folder_that_holds_something_is_left_alone(whole, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        import_model(whole, out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    assert import_model(whole, out).parameters


def test_a_failure_while_writing_leaves_nothing(whole, tmp_path):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        import_model(whole, tmp_path / "out", progress=stop)
    assert sorted(tmp_path.iterdir()) == before


# GGUF


@pytest.fixture
def file(tmp_path):
    return tiny.gguf_of_hugging_face(tmp_path / "model.gguf", "llama", tiny.hugging_face("llama"))


def test_truncated_gguf(file):
    content = file.read_bytes()
    for length in (0, 10, 23, 24, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        refused(file, "model.gguf")


@pytest.mark.parametrize("at", [8, 16])
@pytest.mark.parametrize("count", [2**63, 2**64 - 1, 2**40, 100_000])
def test_absurd_counts(file, at, count):
    content = bytearray(file.read_bytes())
    content[at : at + 8] = struct.pack("<Q", count)
    file.write_bytes(content)
    refused(file, str(count), "no room")


def test_absurd_string_and_array_lengths(file):
    content = file.read_bytes()
    at = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    file.write_bytes(content[:at] + struct.pack("<Q", 2**61) + content[at + 8 :])
    refused(file, "no room")
    at = content.index(b"general.architecture") - 8
    file.write_bytes(content[:at] + struct.pack("<Q", 2**62) + content[at + 8 :])
    refused(file, "cut short")


def test_duplicate_and_overlapping_tensors(file):
    content = bytearray(file.read_bytes())
    renamed = content.replace(b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight", 1)
    file.write_bytes(renamed)
    refused(file, "blk.1.ffn_up.weight", "twice")
    at = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16 + 4
    content[at : at + 8] = struct.pack("<Q", 0)
    file.write_bytes(content)
    refused(file, "overlap")


def gguf_with(
    path: Path, arch: str = "llama", tensors: dict[str, np.ndarray] | None = None, **keys: object
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        writer.add_key_value(
            key.replace("__", "."),
            value,
            gguf.GGUFValueType.get_type(value),
        )
    for name, data in (tensors or {"token_embd.weight": np.zeros((8, 4), np.float32)}).items():
        writer.add_tensor(name, data)
    tiny.finish(writer)
    return path


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"arch": "mamba"}, "general.architecture is 'mamba'"),
        ({"llama__expert_count": 8}, "expert_count"),
        ({"llama__attention__scale": 0.1}, "attention.scale"),
        ({"llama__attention__causal": False}, "attention.causal is False"),
        ({"llama__attention__causal": True}, "embedding_length is missing"),
        ({"llama__embedding_length": 4, "llama__block_count": 10**6}, "block_count"),
        ({"llama__secret": list(range(5000))}, "secret"),
        ({"llama__embedding_length": list(range(5000))}, "embedding_length is 5000 values"),
        ({"general__alignment": [32, 64]}, "general.alignment"),
        ({}, "embedding_length is missing"),
    ],
)
def test_gguf_of_other_kinds(tmp_path, keys, words):
    refused(gguf_with(tmp_path / "x.gguf", **keys), words)


def test_gguf_rope_kinds(file):
    content = file.read_bytes()
    model = tiny.hugging_face("llama-linear-rope")
    linear = tiny.gguf_of_hugging_face(file.parent / "linear.gguf", "llama-linear-rope", model).read_bytes()
    assert b"linear" in linear and b"linear" not in content
    file.write_bytes(linear.replace(b"\6\0\0\0\0\0\0\0linear", b"\6\0\0\0\0\0\0\0yarn??"))
    (file.parent / "linear.gguf").unlink()
    refused(file, "rope.scaling.type", "yarn")


def test_gguf_with_the_wrong_number_of_tokens(file):
    """161 tokens for 160 rows: one of them would be read from beyond the embedding."""
    file.unlink()
    tiny.gguf_of_hugging_face(file, "llama", tiny.hugging_face("llama"), n_tokens=161)
    refused(file, "160 rows")


def test_the_command_line_says_it_in_one_line(tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    assert main(["import", str(tmp_path / "model.gguf"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_line_tells_what_came_in(whole, tmp_path, capsys):
    assert main(["import", str(whole), str(tmp_path / "out"), "--json", "--dtype", "bfloat16"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["family"], told["dtype"], told["tensors"]) == ("llama", "bfloat16", 30)
    assert told["parameters"] == sum(
        t.numel() for t in load_file(tmp_path / "out" / "model.safetensors").values()
    )
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert [entry["file"] for entry in provenance["source"]] == ["config.json", "model.safetensors"]
    assert str(tmp_path) not in (tmp_path / "out" / "provenance.json").read_text()
